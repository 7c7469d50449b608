//! The daemon as a process, the way a node runs it.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// A running daemon, in the network namespace of the thread that started it. It is killed
/// when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

/// Where it serves metrics and health unless told otherwise.
const METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 10249);

impl Daemon {
    /// Starts `program` in ipvs mode with these arguments besides; its log goes to a file
    /// in `directory`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(program: &Path, directory: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_in("ipvs", program, directory, arguments)
    }

    /// The same in the mode that is named.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_in(
        mode: &str,
        program: &Path,
        directory: &Path,
        arguments: &[&str],
    ) -> Result<Self> {
        let log = directory.join(format!("daemon-{}.log", fs::read_dir(directory)?.count()));
        let file = File::create(&log)?;
        let child = Command::new(program)
            .arg(format!("--proxy-mode={mode}"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self { child, log })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When the process is gone already.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the daemon ended by itself: {status}\n{}", self.log());
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it did not in time; its log is in the message.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!("the daemon still runs after {timeout:?}\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// CPU time used so far, user and system.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu(&self) -> Result<Duration> {
        let pid = nix::unistd::Pid::from_raw(self.id().cast_signed());
        Ok(nix::time::clock_gettime(nix::time::clock_getcpuclockid(pid)?)?.into())
    }

    /// Resident memory, bytes.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn resident(&self) -> Result<u64> {
        self.memory("VmRSS:")
    }

    /// The most of it so far.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn peak(&self) -> Result<u64> {
        self.memory("VmHWM:")
    }

    fn memory(&self, which: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(which));
        let kib = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok());
        kib.map(|kib: u64| kib << 10).with_context(|| format!("no {which}"))
    }

    /// The sum of a metric over its labels; `None` when there is none of that name yet.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub fn metric(&self, name: &str) -> Result<Option<f64>> {
        Ok(Page::fetch()?.sum(name))
    }

    /// Waits until a metric satisfies `wanted`, and returns it.
    ///
    /// # Errors
    /// When it did not in time, or the daemon has ended; its log is in the message.
    pub fn wait_for(
        &self,
        name: &str,
        timeout: Duration,
        wanted: impl Fn(f64) -> bool,
    ) -> Result<f64> {
        let end = Instant::now() + timeout;
        let mut last = None;
        while Instant::now() < end {
            last = self.metric(name).ok().flatten();
            if let Some(value) = last.filter(|value| wanted(*value)) {
                return Ok(value);
            }
            if self.ended() {
                bail!("the daemon ended by itself while {name} was {last:?}\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("{name} is {last:?} after {timeout:?}\n{}", self.log())
    }

    /// Whether it is a zombie, that is, has ended and was not waited for.
    fn ended(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        status.lines().any(|line| line.starts_with("State:\tZ"))
    }
}

/// The metrics of one moment, of the daemon in the calling thread's network namespace.
#[derive(Debug)]
pub struct Page(String);

impl Page {
    /// # Errors
    /// When no daemon answers.
    pub fn fetch() -> Result<Self> {
        Ok(Self(get(SocketAddr::from(METRICS), "/metrics")?))
    }

    /// Bytes of the page.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The samples of a metric.
    pub fn lines<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.lines().filter(move |line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
        })
    }

    /// The sum of a metric over its labels; `None` when there is none of that name yet.
    #[must_use]
    pub fn sum(&self, name: &str) -> Option<f64> {
        self.sum_where(name, "")
    }

    /// The same over those whose labels contain this text, as `kind="Service"`.
    #[must_use]
    pub fn sum_where(&self, name: &str, label: &str) -> Option<f64> {
        let values = self.0.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            if !rest.starts_with(['{', ' ']) || !rest.contains(label) {
                return None;
            }
            rest.rsplit(' ').next()?.parse::<f64>().ok()
        });
        values.reduce(|a, b| a + b)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An HTTP answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    /// Status line and headers as they came.
    pub head: String,
    pub body: String,
}

impl Answer {
    /// The value of a header, named in any case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// A plain HTTP/1.1 GET: the body, whatever the status.
///
/// # Errors
/// When nobody answers.
pub fn get(address: SocketAddr, path: &str) -> Result<String> {
    Ok(fetch(address, path)?.body)
}

/// A plain HTTP/1.1 GET.
///
/// # Errors
/// When nobody answers, or not in HTTP.
pub fn fetch(address: SocketAddr, path: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) =
        answer.split_once("\r\n\r\n").context("an answer without an end of headers")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("no status in {head:?}"))?;
    Ok(Answer { status, head: head.to_owned(), body: body.to_owned() })
}
