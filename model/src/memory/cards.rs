//! GPUs by name, to plan for machines that are elsewhere.

/// The kernels use instructions on bf16 that came with this compute capability.
pub const LEAST_COMPUTE_CAPABILITY: (u8, u8) = (8, 0);

/// A card as its driver describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuCard {
    /// With the size in the vendor's gigabytes.
    pub name: &'static str,
    /// What `cuMemGetInfo` calls total, rounded down to a tenth of a GiB: error correction and firmware keep the rest,
    /// and how much differs a little between drivers.
    pub total: u64,
    /// Major and minor.
    pub compute_capability: (u8, u8),
}

const fn card(name: &'static str, tenths_of_gib: u64, compute_capability: (u8, u8)) -> GpuCard {
    GpuCard {
        name,
        total: tenths_of_gib * (1 << 30) / 10,
        compute_capability,
    }
}

impl GpuCard {
    pub const ALL: [Self; 17] = [
        card("B200-192GB", 1783, (10, 0)),
        card("H200-141GB", 1398, (9, 0)),
        card("GH200-96GB", 945, (9, 0)),
        card("H100-NVL-94GB", 930, (9, 0)),
        card("H100-80GB", 791, (9, 0)),
        card("A100-80GB", 791, (8, 0)),
        card("A100-40GB", 393, (8, 0)),
        card("L40S-48GB", 443, (8, 9)),
        card("A6000-48GB", 474, (8, 6)),
        card("A40-48GB", 443, (8, 6)),
        card("L4-24GB", 220, (8, 9)),
        card("A10G-24GB", 220, (8, 6)),
        card("RTX-4090-24GB", 236, (8, 9)),
        card("RTX-3090-24GB", 236, (8, 6)),
        card("V100-32GB", 317, (7, 0)),
        card("V100-16GB", 157, (7, 0)),
        card("T4-16GB", 145, (7, 5)),
    ];

    /// The card of this name; the size may be left out where there is one only.
    pub fn find(name: &str) -> Option<Self> {
        let exact = Self::ALL
            .into_iter()
            .find(|card| card.name.eq_ignore_ascii_case(name));
        let model = |card: &Self| {
            let model = card.name.rsplit_once('-').map_or(card.name, |(model, _)| model);
            model.eq_ignore_ascii_case(name)
        };
        exact.or_else(|| {
            let mut found = Self::ALL.into_iter().filter(model);
            found.next().filter(|_| found.next().is_none())
        })
    }

    /// Whether it multiplies 8-bit floats.
    pub fn multiplies_e4m3(&self) -> bool {
        self.compute_capability >= (8, 9)
    }

    /// Whether the kernels run on it.
    pub fn is_supported(&self) -> bool {
        self.compute_capability >= LEAST_COMPUTE_CAPABILITY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_needed_where_there_are_two() {
        let name = |text| GpuCard::find(text).map(|card| card.name);
        assert_eq!(name("h100-80gb"), Some("H100-80GB"));
        assert_eq!(name("T4"), Some("T4-16GB"));
        assert_eq!(name("rtx-4090"), Some("RTX-4090-24GB"));
        assert_eq!((name("A100"), name("A100-40GB")), (None, Some("A100-40GB")));
        assert_eq!((name(""), name("80GB")), (None, None));
    }

    #[test]
    fn no_card_has_more_than_its_name_says() {
        for card in GpuCard::ALL {
            let size = card
                .name
                .rsplit_once('-')
                .expect("a size")
                .1
                .trim_end_matches("GB");
            let size: u64 = size.parse().expect("a number");
            assert!(
                card.total < size << 30 && card.total > (size << 30) * 9 / 10,
                "{card:?}"
            );
        }
    }
}
