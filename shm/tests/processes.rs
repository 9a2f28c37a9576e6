//! Real processes and real signals: this binary runs itself once for every party.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_shm::{
    AbortReason, Awaited, EnginePort, GroupShape, Party, RankPort, Segment, ShmError, Wait, sweep_orphans,
};

const DEV_SHM: &str = "/dev/shm";
/// Longer than anything here takes on a busy machine, so that a bug ends in an error and not in a hang.
const LONG: Duration = Duration::from_secs(60);

fn shape(world_size: u32) -> GroupShape {
    GroupShape {
        world_size,
        epoch: 1,
        plan_slots: 2,
        plan_slot_bytes: 4096,
        output_slots: 2,
        output_slot_bytes: 64,
        message_bytes: 1024,
        arena_bytes: 1 << 16,
    }
}

/// A child process in one of the roles below; killed when dropped.
struct Actor {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Actor {
    fn spawn(role: &str, path: &Path, arguments: &[(&str, String)]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "act", "--ignored", "--nocapture"])
            .env("ROLE", role)
            .env("SEGMENT", path)
            .envs(arguments.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    fn rank(role: &str, segment: &Segment, rank: u32, limit: Duration) -> Self {
        let arguments = [
            ("RANK", rank.to_string()),
            ("LIMIT_MS", limit.as_millis().to_string()),
        ];
        Self::spawn(role, segment.path(), &arguments)
    }

    /// What the role has to say, without the test harness's own lines.
    fn report(&mut self) -> String {
        let mut lines = self.lines.by_ref().lines().map(|line| line.unwrap());
        lines
            .find_map(|line| line.split_once("REPORT ").map(|(_, text)| text.to_owned()))
            .expect("a report")
    }

    fn signal(&self, signal: libc::c_int) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: kill touches no memory; the child has not been waited for, so the id is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(clippy::print_stdout, reason = "the pipe to the parent")]
fn report(text: impl std::fmt::Debug) {
    // The harness leaves its line open; a report has one of its own.
    println!("\nREPORT {text:?}");
}

#[test]
#[ignore = "the child process of the other tests"]
fn act() {
    let variable = |name: &str| std::env::var(name).expect(name);
    let path = PathBuf::from(variable("SEGMENT"));
    if variable("ROLE") == "creator" {
        return act_creator(&path);
    }
    let segment = Arc::new(Segment::open(&path).unwrap());
    let rank = variable("RANK").parse().unwrap();
    let limit = Duration::from_millis(variable("LIMIT_MS").parse().unwrap());
    let port = RankPort::join(segment, rank, Wait::ADAPTIVE, limit).unwrap();
    match variable("ROLE").as_str() {
        "collectives" => act_collectives(port),
        "barriers" => act_barriers(port),
        "gathers" => act_gathers(port, variable("REFUSE") == "1"),
        "idle" => act_idle(port),
        other => panic!("no role {other}"),
    }
}

/// Holds a segment until its standard input ends, or it is killed.
fn act_creator(directory: &Path) {
    let segment = Segment::create(directory, "doomed", shape(1)).unwrap();
    report(segment.path());
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn act_idle(mut port: RankPort) {
    let error = port.next_plan(|_| ()).unwrap_err();
    report(error.to_string());
}

/// Barriers until one fails. Rank 1 has some work to do between them, so that others are inside for most of the time.
fn act_barriers(mut port: RankPort) {
    loop {
        if port.rank() == 1 {
            std::thread::sleep(Duration::from_micros(200));
        }
        let start = Instant::now();
        if let Err(error) = port.barrier() {
            let verdict = match error {
                ShmError::Aborted { reason } => format!("aborted: {reason}"),
                ShmError::TimedOut {
                    party,
                    awaited: Awaited::Barrier(number),
                    limit,
                } => {
                    assert!(start.elapsed() >= limit, "{:?}", start.elapsed());
                    assert_eq!(number, port.barrier_count());
                    format!("timed out: {party}")
                }
                other => panic!("{other}"),
            };
            return report(verdict);
        }
    }
}

/// Large gathers; reports the barriers that they took after the ranks have got to know each other.
fn act_gathers(mut port: RankPort, refuse: bool) {
    // Where Yama lets a process be read by its ancestors only (Ubuntu).
    // SAFETY: touches no memory; fails where there is no Yama.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
    if refuse {
        refuse_direct_reads();
    }
    // More than half a mebibyte, and no whole number of anything.
    const LEN: usize = (600 << 10) / size_of::<f32>() + 5;
    let world_size = port.world_size();
    let mut before = 0;
    for step in 0..3 {
        if step == 1 {
            before = port.barrier_count();
        }
        let mine = values(step, port.rank(), LEN);
        let expected = bits(&concatenated(step, world_size, LEN));
        let mut all = vec![0.0; LEN * world_size as usize];
        port.all_gather(&mine, &mut all).unwrap();
        assert_eq!(bits(&all), expected);
        let mut gathered = vec![0.0; if port.rank() == 1 { all.len() } else { 0 }];
        port.gather(1, &mine, &mut gathered).unwrap();
        assert!(port.rank() != 1 || bits(&gathered) == expected);
    }
    report(port.barrier_count() - before);
}

/// As a container's seccomp profile may: `process_vm_readv` fails with EPERM from here on.
fn refuse_direct_reads() {
    let instruction = |code: u32, jump_if_not: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: jump_if_not,
        k,
    };
    // The system call's number is the first word of what the filter sees.
    let mut filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            1,
            libc::SYS_process_vm_readv as u32,
        ),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: neither call writes memory; the kernel copies the program, which lives until the calls are done.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program
            ),
            0
        );
    }
}

/// xorshift64*: the same numbers in every process.
struct Random(u64);

impl Random {
    fn of(step: u64, rank: u32) -> Self {
        Self((step << 8 | u64::from(rank)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, bound: u64) -> usize {
        (self.next() % bound) as usize
    }
}

fn values(step: u64, rank: u32, len: usize) -> Vec<f32> {
    let mut random = Random::of(step, rank);
    (0..len)
        .map(|_| (random.next() >> 40) as f32 * 1e-4 - 800.0)
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The reference: added one after the other, in rank order.
fn sum(step: u64, world_size: u32, len: usize) -> Vec<f32> {
    let mut sum = values(step, 0, len);
    for rank in 1..world_size {
        sum.iter_mut()
            .zip(values(step, rank, len))
            .for_each(|(sum, value)| *sum += value);
    }
    sum
}

fn concatenated(step: u64, world_size: u32, len: usize) -> Vec<f32> {
    (0..world_size).flat_map(|rank| values(step, rank, len)).collect()
}

fn fingerprint(values: &[f32]) -> u64 {
    bits(values).into_iter().fold(0, |hash, bits| {
        (hash ^ u64::from(bits)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// A plan is a step's number and length, then filling; an empty plan is the end.
fn act_collectives(mut port: RankPort) {
    loop {
        let plan = port.next_plan(<[u8]>::to_vec).unwrap();
        let Some((head, filling)) = plan.split_first_chunk::<16>() else {
            return report("done");
        };
        let [step, len] = [0, 8].map(|at| u64::from_le_bytes(head[at..at + 8].try_into().unwrap()));
        assert!(filling.iter().all(|byte| *byte == step as u8));
        if Random::of(step, 100 + port.rank()).below(7) == 0 {
            std::thread::sleep(Duration::from_micros(300)); // Skew.
        }
        let reduced = check_collectives(&mut port, step, len as usize);
        if port.rank() == 0 {
            let print = fingerprint(&reduced).to_le_bytes();
            let fill = |slot: &mut [u8]| {
                slot[..8].copy_from_slice(&print);
                Ok::<_, ShmError>(8)
            };
            port.publish_output(fill).unwrap();
        }
    }
}

fn check_collectives(port: &mut RankPort, step: u64, len: usize) -> Vec<f32> {
    let (me, world_size) = (port.rank(), port.world_size());
    let message = |rank: u32| vec![rank as u8; Random::of(step, 50 + rank).below(1025)];
    let messages = port.exchange(&message(me)).unwrap();
    assert!((0..world_size).all(|rank| messages[rank as usize] == message(rank)));

    let mine = values(step, me, len);
    let mut all = vec![0.0; len * world_size as usize];
    port.all_gather(&mine, &mut all).unwrap();
    assert_eq!(bits(&all), bits(&concatenated(step, world_size, len)));

    let root = (step % u64::from(world_size)) as u32;
    let mut gathered = vec![0.0; if me == root { all.len() } else { 0 }];
    port.gather(root, &mine, &mut gathered).unwrap();
    assert!(me != root || bits(&gathered) == bits(&all));

    let mut sent = mine.clone();
    port.broadcast(root, &mut sent).unwrap();
    assert_eq!(bits(&sent), bits(&values(step, root, len)));

    gather_in_arena(port, step, &mine);

    let mut reduced = mine;
    port.all_reduce(&mut reduced).unwrap();
    assert_eq!(
        bits(&reduced),
        bits(&sum(step, world_size, len)),
        "rank {me} step {step} length {len}"
    );
    reduced
}

/// What the kernels do: each rank writes its columns in place, one barrier, everyone reads; two halves in turn.
fn gather_in_arena(port: &mut RankPort, step: u64, mine: &[f32]) {
    let arena = port.arena();
    let (me, world_size) = (port.rank() as usize, port.world_size() as usize);
    let half = arena.len() / 2 / size_of::<f32>();
    let len = mine.len().min(half / world_size);
    // SAFETY: the arena holds two halves of `half` floats.
    let base = unsafe {
        arena
            .as_ptr()
            .cast::<f32>()
            .as_ptr()
            .add((step % 2) as usize * half)
    };
    // SAFETY: each rank writes its own part, and nobody else touches that before the barrier; who read this half two
    // steps ago has passed many barriers since.
    unsafe { std::ptr::copy_nonoverlapping(mine.as_ptr(), base.add(me * len), len) };
    port.barrier().unwrap();
    // SAFETY: everyone has written, and this half is written again only after the next step's barriers.
    let all = unsafe { std::slice::from_raw_parts(base, len * world_size) };
    let expected: Vec<f32> = (0..world_size as u32)
        .flat_map(|rank| values(step, rank, mine.len())[..len].to_vec())
        .collect();
    assert_eq!(bits(all), bits(&expected));
}

#[test]
fn random_steps_agree_with_the_reference_bit_by_bit() {
    const STEPS: u64 = 100;
    for world_size in 1..=4 {
        let directory = tempfile::tempdir_in(DEV_SHM).unwrap();
        let segment = Arc::new(Segment::create(directory.path(), "steps", shape(world_size)).unwrap());
        let mut ranks: Vec<_> = (0..world_size)
            .map(|rank| Actor::rank("collectives", &segment, rank, LONG))
            .collect();
        let mut engine = EnginePort::join(Arc::clone(&segment), Wait::ADAPTIVE).unwrap();
        segment.unlink_when_joined(LONG).unwrap();
        assert!(!segment.path().exists());
        for step in 0..STEPS {
            let mut random = Random::of(step, 200);
            // Many short ones, some that take several slices, and sometimes nothing at all.
            let len = random.below(if step % 5 == 0 { 3000 } else { 100 });
            let filling = random.below(4000);
            let fill = |slot: &mut [u8]| {
                slot[..8].copy_from_slice(&step.to_le_bytes());
                slot[8..16].copy_from_slice(&(len as u64).to_le_bytes());
                slot[16..16 + filling].fill(step as u8);
                Ok::<_, ShmError>(16 + filling)
            };
            engine.publish_plan(LONG, fill).unwrap();
            let print = engine
                .wait_output(LONG, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
                .unwrap();
            assert_eq!(print, fingerprint(&sum(step, world_size, len)));
        }
        engine.publish_plan(LONG, |_| Ok::<_, ShmError>(0)).unwrap();
        assert!(ranks.iter_mut().all(|rank| rank.report() == "\"done\""));
        let counts = segment.barrier_counts();
        assert!(
            counts
                .iter()
                .all(|count| *count == counts[0] && u64::from(*count) > 6 * STEPS),
            "{counts:?}"
        );
    }
}

/// Barriers of four large gathers of three ranks, of which one may be refused to read the others' memory.
fn barriers_of_gathers(refused: Option<u32>) -> Vec<u32> {
    let directory = tempfile::tempdir_in(DEV_SHM).unwrap();
    let segment = Arc::new(Segment::create(directory.path(), "gathers", shape(3)).unwrap());
    let mut ranks: Vec<_> = (0..3)
        .map(|rank| {
            let refuse = if refused == Some(rank) { "1" } else { "0" };
            let arguments = [
                ("RANK", rank.to_string()),
                ("LIMIT_MS", LONG.as_millis().to_string()),
                ("REFUSE", refuse.to_owned()),
            ];
            Actor::spawn("gathers", segment.path(), &arguments)
        })
        .collect();
    ranks
        .iter_mut()
        .map(|rank| rank.report().parse().unwrap())
        .collect()
}

#[test]
fn large_gathers_go_past_the_slots_where_the_kernel_lets_them() {
    // One barrier when all may read, and one when all have read.
    assert_eq!(barriers_of_gathers(None), [8; 3]);
    // One rank that may not read its peers is enough for all to go through the slots, of 1024 bytes here.
    assert_eq!(barriers_of_gathers(Some(2)), [4 * 601; 3]);
}

/// Three ranks in a loop of barriers, one of which has just got a signal.
fn with_a_victim(victim: u32, signal: libc::c_int, limit: Duration) -> (Arc<Segment>, Vec<Actor>) {
    let directory = tempfile::tempdir_in(DEV_SHM).unwrap();
    let segment = Arc::new(Segment::create(directory.path(), "victim", shape(3)).unwrap());
    let ranks: Vec<_> = (0..3)
        .map(|rank| Actor::rank("barriers", &segment, rank, limit))
        .collect();
    let _engine = EnginePort::join(Arc::clone(&segment), Wait::ADAPTIVE).unwrap();
    segment.unlink_when_joined(LONG).unwrap();
    let start = Instant::now();
    while segment.barrier_counts().iter().any(|count| *count < 100) {
        assert!(
            start.elapsed() < LONG && segment.abort_reason().is_none(),
            "{:?}",
            segment.abort_reason()
        );
        std::hint::spin_loop();
    }
    ranks[victim as usize].signal(signal);
    (segment, ranks)
}

#[test]
fn survivors_name_the_dead_rank_after_their_limit() {
    let limit = Duration::from_secs(1);
    // Rank 2 dies inside its barriers for the most part, rank 1 outside; a stopped process is as absent as a dead one.
    for (victim, signal) in [(2, libc::SIGKILL), (1, libc::SIGKILL), (1, libc::SIGSTOP)] {
        let (segment, mut ranks) = with_a_victim(victim, signal, limit);
        let start = Instant::now();
        let dead = ranks.remove(victim as usize);
        let timed_out = format!("\"timed out: rank {victim}\"");
        let released = format!("\"aborted: rank {victim} timed out\"");
        let reports: Vec<_> = ranks.iter_mut().map(Actor::report).collect();
        assert!(reports.contains(&timed_out), "{reports:?}");
        assert!(
            reports
                .iter()
                .all(|report| [&timed_out, &released].contains(&report)),
            "{reports:?}"
        );
        assert!(
            start.elapsed() < limit + Duration::from_secs(3),
            "{:?}",
            start.elapsed()
        );
        assert_eq!(
            segment.abort_reason(),
            Some(AbortReason::TimedOut(Party::Rank(victim)))
        );
        drop(dead);
    }
}

#[test]
fn a_supervisor_releases_survivors_at_once() {
    for victim in [1, 2] {
        let (segment, mut ranks) = with_a_victim(victim, libc::SIGKILL, LONG);
        let start = Instant::now();
        segment.abort(AbortReason::Lost(Party::Rank(victim)));
        drop(ranks.remove(victim as usize));
        for rank in &mut ranks {
            assert_eq!(rank.report(), format!("\"aborted: rank {victim} is lost\""));
        }
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    }
}

#[test]
fn an_idle_rank_notices_that_the_creator_is_gone() {
    let directory = tempfile::tempdir_in(DEV_SHM).unwrap();
    let mut creator = Actor::spawn("creator", directory.path(), &[]);
    let path = PathBuf::from(creator.report().trim_matches('"'));
    let segment = Segment::open(&path).unwrap();
    let mut rank = Actor::rank("idle", &segment, 0, LONG);
    let engine = EnginePort::join(Arc::new(segment), Wait::ADAPTIVE).unwrap();
    creator.signal(libc::SIGKILL);
    creator.child.wait().unwrap();
    assert_eq!(
        rank.report(),
        "\"the group was aborted: the process that created the segment is gone\""
    );
    assert_eq!(engine.segment().abort_reason(), Some(AbortReason::CreatorGone));
}

#[test]
fn the_dead_are_swept_and_the_living_kept() {
    let directory = tempfile::tempdir_in(DEV_SHM).unwrap();
    let mut creator = Actor::spawn("creator", directory.path(), &[]);
    let path = PathBuf::from(creator.report().trim_matches('"'));
    let ours = Segment::create(directory.path(), "ours", shape(1)).unwrap();
    assert_eq!(sweep_orphans(directory.path()).unwrap(), 0, "both creators live");
    creator.signal(libc::SIGKILL);
    creator.child.wait().unwrap();
    let other_boot = directory.path().join("phalanx.0123456789ab.other.1");
    std::fs::write(&other_boot, b"left by another boot").unwrap();
    std::fs::set_permissions(&other_boot, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(directory.path().join("phalanx.log"), b"not a segment").unwrap();
    // Another user of the directory who still holds the dead group's segment is no reason to keep its name.
    let held = Segment::open(&path).unwrap();
    assert_eq!(sweep_orphans(directory.path()).unwrap(), 2);
    assert!(!path.exists() && !other_boot.exists());
    assert!(ours.path().exists() && directory.path().join("phalanx.log").exists());
    drop(held);
}
