//! Running a test's body in processes that find the soft GPU.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Output, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use cudarc::{
    driver::{CudaContext, CudaFunction, CudaStream, DeviceRepr, LaunchConfig},
    nvrtc::compile_ptx,
};
use softgpu::{Env, LibraryDir};

const CHILD: &str = "SOFTGPU_TEST_CHILD";
const RANK: &str = "SOFTGPU_TEST_RANK";
const MEETING: &str = "SOFTGPU_TEST_MEETING";
/// A process that has not ended by then hangs.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) type Settings<'a> = &'a [(&'a str, &'a str)];

/// Polls until `ready` gives something.
pub(crate) fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "waited for {what} for {LIMIT:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A process that ends with the test.
pub(crate) struct Process(Option<Child>);

impl Process {
    fn spawn(libraries: &LibraryDir, test: &str, settings: Settings<'_>) -> Self {
        let mut command = libraries.test_command(test).expect("own path");
        command
            .env(CHILD, test)
            .env(
                Env::CACHE,
                Path::new(env!("CARGO_TARGET_TMPDIR")).join("softgpu-cache"),
            )
            .envs(settings.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self(Some(command.spawn().expect("the test executable starts")))
    }

    pub(crate) fn kill(&mut self) {
        self.0
            .as_mut()
            .expect("running")
            .kill()
            .expect("it can be killed");
    }

    /// What it said, once it has ended. Its output must fit into a pipe.
    pub(crate) fn output(mut self) -> Output {
        wait_for("a process of the test to end", || {
            self.0.as_mut().expect("running").try_wait().expect("waited")
        });
        self.0
            .take()
            .expect("running")
            .wait_with_output()
            .expect("output")
    }

    /// What it said on standard error, if it passed.
    pub(crate) fn passed(self, test: &str) -> String {
        let output = self.output();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let one = stdout.contains("1 passed"); // none, if the name is wrong
        assert!(
            output.status.success() && one,
            "{test}: {:?}\n{stdout}\n{stderr}",
            output.status
        );
        stderr
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn is_child(test: &str) -> bool {
    env::var(CHILD).is_ok_and(|child| child == test)
}

/// Runs `body` in a process on the soft GPU. Returns what was said on standard error, in the parent only.
pub(crate) fn on_soft_gpu(test: &str, settings: Settings<'_>, body: impl FnOnce()) -> Option<String> {
    if is_child(test) {
        body();
        return None;
    }
    let libraries = LibraryDir::new().expect("the soft GPU is built");
    Some(Process::spawn(&libraries, test, settings).passed(test))
}

/// One of several processes of a test.
pub(crate) struct Rank {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// A directory that all of them see.
    pub(crate) meeting: PathBuf,
}

impl Rank {
    /// Publishes bytes for the others.
    pub(crate) fn publish(&self, name: &str, bytes: &[u8]) {
        let own = self.meeting.join(format!("{name}.{}.tmp", self.rank));
        fs::write(&own, bytes).expect("written");
        fs::rename(own, self.meeting.join(name)).expect("renamed");
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        wait_for(name, || fs::read(self.meeting.join(name)).ok())
    }
}

/// The processes of a test with ranks, in the parent.
pub(crate) struct Ranks {
    pub(crate) processes: Vec<Process>,
    pub(crate) meeting: tempfile::TempDir,
    _libraries: LibraryDir,
}

/// Runs `body` in `world` processes. Returns them in the parent.
pub(crate) fn spawn_ranks(
    test: &str,
    world: usize,
    settings: Settings<'_>,
    body: impl FnOnce(Rank),
) -> Option<Ranks> {
    if is_child(test) {
        let rank = env::var(RANK).expect("a rank").parse().expect("a number");
        body(Rank {
            rank,
            world,
            meeting: env::var_os(MEETING).expect("a directory").into(),
        });
        return None;
    }
    let libraries = LibraryDir::new().expect("the soft GPU is built");
    let meeting = tempfile::tempdir().expect("a directory");
    let path = meeting.path().to_str().expect("UTF-8").to_owned();
    let spawn = |rank: usize| {
        let rank = rank.to_string();
        let mut all = settings.to_vec();
        all.extend([(RANK, rank.as_str()), (MEETING, path.as_str())]);
        Process::spawn(&libraries, test, &all)
    };
    let processes = (0..world).map(spawn).collect();
    Some(Ranks {
        processes,
        meeting,
        _libraries: libraries,
    })
}

/// As [`spawn_ranks`]; all must pass. Returns what each said on standard error.
pub(crate) fn on_ranks(
    test: &str,
    world: usize,
    settings: Settings<'_>,
    body: impl FnOnce(Rank),
) -> Option<Vec<String>> {
    let ranks = spawn_ranks(test, world, settings, body)?;
    Some(
        ranks
            .processes
            .into_iter()
            .map(|process| process.passed(test))
            .collect(),
    )
}

/// A device with a stream and one compiled kernel `f`.
pub(crate) struct Toy {
    pub(crate) context: Arc<CudaContext>,
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) function: CudaFunction,
}

impl Toy {
    pub(crate) fn new(source: &str) -> Self {
        let (context, stream) = open();
        let ptx = compile_ptx(source).expect("the kernel compiles");
        let function = context
            .load_module(ptx)
            .expect("a module")
            .load_function("f")
            .expect("a kernel");
        Self {
            context,
            stream,
            function,
        }
    }
}

pub(crate) fn open() -> (Arc<CudaContext>, Arc<CudaStream>) {
    let context = CudaContext::new(0).expect("a device");
    let stream = context.new_stream().expect("a stream");
    (context, stream)
}

pub(crate) fn grid(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// Numbers between -1 and 1 that look random and are the same every time.
pub(crate) fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// Copies to the host and waits.
pub(crate) fn download<T: DeviceRepr + Default + Clone>(
    stream: &Arc<CudaStream>,
    slice: &cudarc::driver::CudaSlice<T>,
) -> Vec<T> {
    let values = stream.clone_dtoh(slice).expect("copied");
    stream.synchronize().expect("the stream is sound");
    values
}
