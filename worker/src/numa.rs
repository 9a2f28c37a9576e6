//! The CPUs that are near a device. Copies to a GPU from memory of another NUMA node cross the link between sockets.

use std::{fs, path::Path};

use rustix::thread::CpuSet;

/// The CPUs of the NUMA node that a PCI device hangs on. None if the system has one node or does not say.
///
/// `sysfs` is where sysfs is mounted; `pci_bus_id` as the CUDA driver writes it, `00000000:65:00.0`.
pub(crate) fn cpus_near(sysfs: &Path, pci_bus_id: &str) -> Option<Vec<usize>> {
    // The kernel writes the domain in four digits.
    let (domain, rest) = pci_bus_id.split_once(':')?;
    let domain = u32::from_str_radix(domain, 16).ok()?;
    let device = format!("{domain:04x}:{}", rest.to_ascii_lowercase());
    let node = fs::read_to_string(sysfs.join("bus/pci/devices").join(device).join("numa_node")).ok()?;
    // -1: not known.
    let node: u32 = node.trim().parse().ok()?;
    let list = sysfs.join(format!("devices/system/node/node{node}/cpulist"));
    parse_cpu_list(fs::read_to_string(list).ok()?.trim())
}

/// Of the CPUs near a device, those that were given to the rank; if there are none, those the process may use.
pub(crate) fn choose(near: &[usize], given: Option<&[usize]>, allowed: &[usize]) -> Option<Vec<usize>> {
    let common = |cpus: &[usize]| -> Option<Vec<usize>> {
        let common: Vec<usize> = near.iter().copied().filter(|cpu| cpus.contains(cpu)).collect();
        (!common.is_empty()).then_some(common)
    };
    given.and_then(common).or_else(|| common(allowed))
}

/// `0-3,8,10-11`, as the kernel lists CPUs.
fn parse_cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs with a device on node 1.
    fn sysfs(node: &str, list: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, format!("{text}\n")).expect("written");
        };
        write("bus/pci/devices/0000:65:00.0/numa_node", node);
        write("devices/system/node/node1/cpulist", list);
        dir
    }

    #[test]
    fn a_device_is_near_the_cpus_of_its_node() {
        let near = |node, list, device| cpus_near(sysfs(node, list).path(), device);
        assert_eq!(near("1", "2-4,9", "00000000:65:00.0"), Some(vec![2, 3, 4, 9]));
        assert_eq!(
            near("-1", "2-4", "00000000:65:00.0"),
            None,
            "the kernel does not know"
        );
        assert_eq!(near("0", "2-4", "00000000:65:00.0"), None, "no such node");
        assert_eq!(near("1", "2-4", "00000000:66:00.0"), None, "no such device");
        assert_eq!(near("1", "", "00000000:65:00.0"), None, "a node of memory alone");
        assert_eq!(near("1", "0-99999999", "00000000:65:00.0"), None);
        assert_eq!(near("1", "4-2", "00000000:65:00.0"), None);
        assert_eq!(near("1", "2", "nonsense"), None);
    }

    #[test]
    fn what_was_given_comes_before_what_is_allowed() {
        let near = [4, 5, 6, 7];
        assert_eq!(choose(&near, Some(&[3, 4, 5]), &[0, 6]), Some(vec![4, 5]));
        assert_eq!(choose(&near, Some(&[0, 1]), &[0, 1, 6, 7]), Some(vec![6, 7]));
        assert_eq!(choose(&near, None, &[6]), Some(vec![6]));
        assert_eq!(choose(&near, Some(&[0]), &[0, 1]), None);
    }
}
