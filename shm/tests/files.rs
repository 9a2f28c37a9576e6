//! Files as they may be found: full volumes, damaged headers, other people's files, files that change.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use phalanx_shm::{GroupShape, HeaderProblem, MappedFile, Segment, ShmError};
use proptest::prelude::*;

const SHAPE: GroupShape = GroupShape {
    world_size: 2,
    epoch: 3,
    plan_slots: 2,
    plan_slot_bytes: 1000,
    output_slots: 2,
    output_slot_bytes: 1000,
    message_bytes: 1000,
    arena_bytes: 100_000,
};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

#[test]
fn a_segment_is_private_and_has_all_its_pages() {
    let directory = directory();
    let segment = Segment::create(directory.path(), "pages", SHAPE).unwrap();
    let meta = fs::metadata(segment.path()).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o600);
    assert_eq!(meta.len(), SHAPE.total_bytes());
    assert_eq!(
        meta.blocks() * 512,
        SHAPE.total_bytes(),
        "no page is left to be found missing later"
    );
}

#[test]
fn a_volume_that_is_too_small_is_an_error_that_leaves_nothing() {
    let directory = directory();
    let free = free_bytes(directory.path());
    let shape = GroupShape {
        arena_bytes: 1 << 40,
        ..SHAPE
    };
    assert!(
        free < shape.total_bytes(),
        "this machine has a terabyte of shared memory"
    );
    let error = Segment::create(directory.path(), "big", shape).unwrap_err();
    let ShmError::NoSpace { needed, ref dir, .. } = error else {
        panic!("{error}")
    };
    assert_eq!((needed, dir.as_path()), (shape.total_bytes(), directory.path()));
    assert!(is_empty(directory.path()));
}

fn free_bytes(directory: &Path) -> u64 {
    let path = std::ffi::CString::new(directory.to_str().unwrap()).unwrap();
    // SAFETY: plain integers, and both pointers are valid for the call.
    unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        assert_eq!(libc::statvfs(path.as_ptr(), &raw mut stat), 0);
        stat.f_bavail * stat.f_frsize
    }
}

#[test]
fn a_name_is_used_once_per_epoch() {
    let directory = directory();
    let first = Segment::create(directory.path(), "name", SHAPE).unwrap();
    let error = Segment::create(directory.path(), "name", SHAPE).unwrap_err();
    assert!(
        matches!(error, ShmError::Exists { ref path } if path == first.path()),
        "{error}"
    );
    assert!(
        first.path().exists(),
        "the first one is none of the second one's business"
    );
    Segment::create(directory.path(), "name", GroupShape { epoch: 4, ..SHAPE }).unwrap();
}

#[test]
fn bad_arguments_create_nothing() {
    let directory = directory();
    let error = Segment::create(directory.path(), "../x", SHAPE).unwrap_err();
    assert!(matches!(error, ShmError::BadName { .. }), "{error}");
    let error = Segment::create(
        directory.path(),
        "x",
        GroupShape {
            plan_slots: 3,
            ..SHAPE
        },
    )
    .unwrap_err();
    assert!(
        matches!(
            error,
            ShmError::BadShape(problem) if problem.field == "plan_slots" && problem.value == 3
        ),
        "{error}"
    );
    assert!(is_empty(directory.path()));
}

#[test]
fn files_that_are_not_ours_are_refused() {
    let directory = directory();
    let segment = Segment::create(directory.path(), "ours", SHAPE).unwrap();
    let link = directory.path().join("link");
    symlink(segment.path(), &link).unwrap();
    assert!(
        matches!(Segment::open(&link), Err(ShmError::Io { .. })),
        "no symbolic links"
    );
    assert!(Segment::open(directory.path()).is_err());
    fs::set_permissions(segment.path(), Permissions::from_mode(0o640)).unwrap();
    let error = Segment::open(segment.path()).unwrap_err();
    assert!(
        matches!(error, ShmError::NotOurs { ref problem, .. } if problem.contains("640")),
        "{error}"
    );
}

fn raw(directory: &Path, bytes: &[u8]) -> std::path::PathBuf {
    let path = directory.join("raw");
    let mut file = File::create(&path).unwrap();
    file.set_permissions(Permissions::from_mode(0o600)).unwrap();
    file.write_all(bytes).unwrap();
    path
}

#[test]
fn a_file_of_another_length_is_refused() {
    let directory = directory();
    let segment = Segment::create(directory.path(), "cut", SHAPE).unwrap();
    let total = SHAPE.total_bytes();
    let file = OpenOptions::new().write(true).open(segment.path()).unwrap();
    for len in [total + 4096, total - 1, 4096, 128, 127, 1, 0] {
        file.set_len(len).unwrap();
        let error = Segment::open(segment.path()).unwrap_err();
        let ShmError::BadHeader {
            problem: HeaderProblem::Size { found, .. },
            ..
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!(found, len);
    }
}

#[test]
fn holes_are_filled_when_a_segment_is_opened() {
    let directory = directory();
    let segment = Segment::create(directory.path(), "holes", SHAPE).unwrap();
    let path = directory.path().join("copy");
    let mut header = [0; 128];
    File::open(segment.path())
        .unwrap()
        .read_exact_at(&mut header, 0)
        .unwrap();
    let copy = raw(directory.path(), &header);
    fs::rename(copy, &path).unwrap();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(SHAPE.total_bytes())
        .unwrap();
    let _opened = Segment::open(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().blocks() * 512, SHAPE.total_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_damaged_header_is_an_error(
        damage in proptest::collection::vec((0usize..128, 1u8..), 1..8),
    ) {
        let directory = directory();
        let segment = Segment::create(directory.path(), "damage", SHAPE).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(segment.path()).unwrap();
        let mut header = [0; 128];
        file.read_exact_at(&mut header, 0).unwrap();
        let whole = header;
        damage.iter().for_each(|(at, flip)| header[*at] ^= flip);
        file.write_all_at(&header, 0).unwrap();
        match Segment::open(segment.path()) {
            Err(ShmError::BadHeader { .. }) => prop_assert_ne!(header, whole),
            Err(other) => prop_assert!(false, "{}", other),
            Ok(_) => prop_assert_eq!(header, whole, "flips that cancel out"),
        }
    }

    #[test]
    fn any_file_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
        let directory = directory();
        let path = raw(directory.path(), &bytes);
        let refused = matches!(Segment::open(&path), Err(ShmError::BadHeader { .. }));
        prop_assert!(refused);
    }
}

#[test]
fn a_mapped_file_shows_its_bytes() {
    let directory = directory();
    let bytes: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
    let file = MappedFile::open(&raw(directory.path(), &bytes)).unwrap();
    assert_eq!(file.bytes(), bytes);
    file.will_need(5000..usize::MAX);
    file.release(0..usize::MAX);
    file.will_need(usize::MAX - 1..usize::MAX);
    assert_eq!(file.as_ref(), bytes, "released bytes can be read again");
    assert_eq!(file.path(), directory.path().join("raw"));
}

#[test]
fn an_empty_file_maps_to_nothing() {
    let directory = directory();
    let file = MappedFile::open(&raw(directory.path(), &[])).unwrap();
    assert_eq!(file.bytes(), []);
    file.will_need(0..100);
    file.release(0..100);
    assert!(file.still_whole().unwrap());
}

#[test]
fn only_regular_files_are_mapped() {
    let directory = directory();
    assert!(matches!(
        MappedFile::open(directory.path()),
        Err(ShmError::Io { .. })
    ));
    assert!(matches!(
        MappedFile::open(Path::new("/dev/null")),
        Err(ShmError::Io { .. })
    ));
    let fifo = directory.path().join("fifo");
    let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
    // SAFETY: the name is NUL-terminated.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    assert!(
        matches!(MappedFile::open(&fifo), Err(ShmError::Io { .. })),
        "and does not wait for a writer"
    );
    let missing = MappedFile::open(&directory.path().join("missing")).unwrap_err();
    assert!(missing.to_string().contains("missing"), "{missing}");
}

#[test]
fn a_replaced_file_is_kept_and_a_cut_one_noticed() {
    let directory = directory();
    let path = raw(directory.path(), &[1; 8192]);
    let file = MappedFile::open(&path).unwrap();
    fs::write(directory.path().join("new"), [2; 10]).unwrap();
    fs::rename(directory.path().join("new"), &path).unwrap();
    assert!(file.still_whole().unwrap() && file.bytes().iter().all(|byte| *byte == 1));
    let file = MappedFile::open(&path).unwrap();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(9)
        .unwrap();
    assert!(!file.still_whole().unwrap());
}

/// Resident bytes of the mapping of `path` in this process.
fn resident(path: &Path) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps
        .lines()
        .skip_while(|line| !line.ends_with(path.to_str().unwrap()));
    let rss = lines
        .find_map(|line| line.strip_prefix("Rss:"))
        .expect("the file is mapped");
    rss.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn released_pages_leave_the_process() {
    const LEN: usize = 4 << 20;
    let directory = directory();
    let path = raw(directory.path(), &vec![7; LEN]);
    let file = MappedFile::open(&path).unwrap();
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    assert_eq!(sum(file.bytes()), 7 * LEN as u64);
    assert_eq!(resident(&path), LEN as u64);
    file.release(100..LEN / 2);
    assert!(resident(&path) <= LEN as u64 / 2 + 4096, "{}", resident(&path));
    file.release(0..LEN);
    assert_eq!(resident(&path), 0);
}
