//! Runs one of PostgreSQL's programs: by argv, in the C locale, for a limited time, with what it wrote kept within bounds.
//!
//! The program gets a process group of its own, and dropping the future kills the whole group: pg_basebackup forks a WAL receiver and
//! initdb forks backends, which must not outlive the job that was cancelled.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use crate::facts::copying::Bytes;

/// Most bytes kept of a program's standard error: its last ones, since the reason comes last.
pub const STDERR_KEPT_BYTES: usize = 8 * 1024;
/// Most bytes kept of a program's standard output: its first ones.
pub const STDOUT_KEPT_BYTES: usize = 256 * 1024;
/// How long a program's output is waited for after its end: a grandchild may hold the pipe.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Who is told how far a program has got; nobody unless said.
#[derive(Clone, Default)]
pub struct Watch(Option<Arc<dyn Fn(Bytes) + Send + Sync>>);

impl Watch {
    /// Told each time that the program says it, about once a second.
    pub fn new(told: impl Fn(Bytes) + Send + Sync + 'static) -> Watch {
        Watch(Some(Arc::new(told)))
    }

    fn tell(&self, bytes: Bytes) {
        if let Some(told) = &self.0 {
            told(bytes);
        }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Watch(somebody)" } else { "Watch(nobody)" })
    }
}

/// A program with its arguments.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    args: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    stdin: Option<Arc<File>>,
    current_dir: PathBuf,
}

/// What a program said.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its first [`STDOUT_KEPT_BYTES`].
    pub stdout: String,
    /// Its last [`STDERR_KEPT_BYTES`], trimmed.
    pub stderr: String,
}

impl Program {
    /// A program by its path.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), args: Vec::new(), env: Vec::new(), stdin: None, current_dir: PathBuf::from("/") }
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// `--name=value`.
    #[must_use]
    pub fn option(self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let mut joined = OsString::from(format!("--{name}="));
        joined.push(value);
        self.arg(joined)
    }

    /// One more environment variable.
    #[must_use]
    pub fn env(mut self, name: &'static str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name, value.as_ref().to_owned()));
        self
    }

    /// Its standard input, and that of whatever it starts; without one it is empty.
    #[must_use]
    pub fn stdin(mut self, file: Arc<File>) -> Self {
        self.stdin = Some(file);
        self
    }

    /// Where it works; without one in the root directory.
    #[must_use]
    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.current_dir = directory.into();
        self
    }

    /// The program's file name, for messages.
    pub fn name(&self) -> String {
        self.path.file_name().map_or_else(|| self.path.display().to_string(), |name| name.to_string_lossy().into_owned())
    }

    /// Starts it with both outputs piped. The caller owns its life.
    pub fn spawn(&self) -> Result<Running> {
        let mut command = Command::new(&self.path);
        command.args(&self.args).env_clear();
        for name in ["PATH", "HOME", "LD_LIBRARY_PATH", "TZ", "TMPDIR"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("LC_ALL", "C").envs(self.env.iter().map(|(name, value)| (name, value)));
        let stdin = match &self.stdin {
            Some(file) => Stdio::from(file.try_clone().with_context(|| format!("the standard input of {}", self.name()))?),
            None => Stdio::null(),
        };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).process_group(0);
        command.current_dir(&self.current_dir);
        let child = command.spawn().with_context(|| format!("cannot start {}", self.path.display()))?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        Ok(Running { child, group })
    }

    /// Runs it to its end, whatever its exit status.
    pub async fn run(&self, limit: Duration) -> Result<Output> {
        self.watched(limit, &Watch::default()).await
    }

    /// The same with `--progress`: what it says of that is told and not kept.
    async fn watched(&self, limit: Duration, watch: &Watch) -> Result<Output> {
        let mut running = self.spawn()?;
        let stdout = running.child.stdout.take().context("standard output was not piped")?;
        let stderr = running.child.stderr.take().context("standard error was not piped")?;
        let mut output = (Vec::new(), Vec::new());
        let ended = tokio::time::timeout(limit, async {
            let mut reading = std::pin::pin!(async {
                tokio::join!(
                    keep_first(stdout, STDOUT_KEPT_BYTES, &mut output.0),
                    keep_last(stderr, STDERR_KEPT_BYTES, &mut output.1, watch)
                )
            });
            tokio::select! {
                _ = &mut reading => running.wait().await,
                status = running.wait() => {
                    // A grandchild that holds the pipe must not hold us: what was said until now is enough.
                    let _ = tokio::time::timeout(DRAIN_LIMIT, reading).await;
                    status
                }
            }
        });
        let status = match ended.await {
            Ok(status) => status.with_context(|| format!("waiting for {}", self.name()))?,
            Err(_) => bail!("{} did not end within {} s and was killed", self.name(), limit.as_secs()),
        };
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Output { status, stdout: text(output.0), stderr: text(output.1).trim().to_owned() })
    }

    /// Runs it to its end; an exit status other than 0 is an error that carries its standard error.
    pub async fn run_ok(&self, limit: Duration) -> Result<Output> {
        self.run_ok_watched(limit, &Watch::default()).await
    }

    /// The same, told how far it has got, of a program that says so.
    pub async fn run_ok_watched(&self, limit: Duration, watch: &Watch) -> Result<Output> {
        let output = self.watched(limit, watch).await?;
        if !output.status.success() {
            bail!(
                "{} failed ({}): {}",
                self.name(),
                output.status,
                if output.stderr.is_empty() { "it said nothing" } else { &output.stderr }
            );
        }
        Ok(output)
    }
}

/// A program under way. Dropping it kills its whole process group.
#[derive(Debug)]
pub struct Running {
    /// The program itself.
    pub child: Child,
    group: Option<Pid>,
}

impl Running {
    /// Waits for its end.
    pub async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        self.kill_group();
        Ok(status)
    }

    fn kill_group(&mut self) {
        // Only once: afterwards the number may be another group's.
        if let Some(group) = self.group.take() {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_group();
    }
}

async fn keep_first(mut from: impl AsyncRead + Unpin, most: usize, kept: &mut Vec<u8>) {
    let mut buffer = [0_u8; 4096];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let room = most.saturating_sub(kept.len()).min(read);
        kept.extend_from_slice(&buffer[..room]);
    }
}

async fn keep_last(mut from: impl AsyncRead + Unpin, most: usize, kept: &mut Vec<u8>, watch: &Watch) {
    let mut buffer = [0_u8; 4096];
    let mut line_at = 0;
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        for byte in &buffer[..read] {
            kept.push(*byte);
            if matches!(byte, b'\n' | b'\r') {
                if let Some(bytes) = std::str::from_utf8(&kept[line_at..]).ok().and_then(progress) {
                    watch.tell(bytes);
                    kept.truncate(line_at);
                }
                line_at = kept.len();
            }
        }
        let surplus = kept.len().saturating_sub(most);
        kept.drain(..surplus);
        line_at = line_at.saturating_sub(surplus);
    }
}

/// A line of `--progress`, as pg_basebackup and pg_rewind write it: `  1234/56789 kB (2%), 0/1 tablespace`, `1234/56789 kB (2%) copied`.
fn progress(line: &str) -> Option<Bytes> {
    let (numbers, _) = line.trim().split_once(" kB (")?;
    let (done, total) = numbers.split_once('/')?;
    let bytes = |text: &str| text.trim().parse::<u64>().ok()?.checked_mul(1_024);
    Some(Bytes { done: bytes(done)?, total: bytes(total)? })
}

/// Whether a file is there and may be executed.
pub fn is_executable(path: &Path) -> bool {
    path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_failure_carries_what_the_program_said() {
        let error = Program::new("/bin/sh").arg("-c").arg("echo because >&2; exit 3").run_ok(LIMIT).await.unwrap_err().to_string();
        assert!(error.contains("because") && error.contains('3'), "{error}");
    }

    #[tokio::test]
    async fn a_flood_of_output_is_bounded_and_does_not_block_the_program() {
        let flood = "i=0; while [ $i -lt 20000 ]; do echo 0123456789012345678901234567890123456789 >&2; i=$((i+1)); done; echo last >&2";
        let output = Program::new("/bin/sh").arg("-c").arg(flood).run(LIMIT).await.unwrap();
        assert!(output.stderr.len() <= STDERR_KEPT_BYTES);
        assert!(output.stderr.ends_with("last"));
    }

    #[tokio::test]
    async fn how_far_it_has_got_is_told_and_does_not_push_its_last_words_out() {
        let says = "i=0; while [ $i -lt 2000 ]; do echo \"$i/2000 kB (1%), 0/1 tablespace\" >&2; i=$((i+1)); done; \
                    printf '2000/2000 kB (100%%) copied\\r' >&2; echo because >&2; exit 1";
        let told = Arc::new(std::sync::Mutex::new(Vec::new()));
        let watch = Watch::new({
            let told = Arc::clone(&told);
            move |bytes| told.lock().unwrap().push(bytes)
        });
        let program = Program::new("/bin/sh").arg("-c").arg(format!("echo before >&2; {says}"));
        let error = program.run_ok_watched(LIMIT, &watch).await.unwrap_err().to_string();
        assert!(error.ends_with("before\nbecause"), "{error}");
        let told = told.lock().unwrap();
        assert_eq!(told.len(), 2_001);
        assert_eq!(told[2_000], Bytes { done: 2_000 << 10, total: 2_000 << 10 });
    }

    #[tokio::test]
    async fn a_program_and_its_children_are_gone_when_the_job_is_cancelled() {
        let directory = tempfile::tempdir().unwrap();
        let pid_file = directory.path().join("pid");
        let script = format!("sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait", pid_file.display());
        let job = tokio::spawn(async move { Program::new("/bin/sh").arg("-c").arg(script).run(LIMIT).await });
        let pid = crate::postgres::files::tests::eventually(|| std::fs::read_to_string(&pid_file).ok()).await;
        job.abort();
        let stat = format!("/proc/{}/stat", pid.trim());
        crate::postgres::files::tests::eventually(|| {
            let gone = std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
            gone.then_some(())
        })
        .await;
    }

    #[tokio::test]
    async fn a_program_that_never_ends_is_killed_at_its_limit() {
        let error = Program::new("/bin/sleep").arg("600").run(Duration::from_millis(50)).await.unwrap_err();
        assert!(error.to_string().contains("was killed"), "{error}");
    }
}
