//! One network namespace with its cgroup: a node, a pod, the fabric or a client outside.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};

use super::layout::Pair;

/// A network namespace held only by an open file, never by a name under `/run/netns`:
/// it ends with the last process and file that uses it, so a crash leaves nothing.
#[derive(Debug)]
pub struct Host {
    name: String,
    netns: File,
    cgroup: PathBuf,
    threads_join: bool,
    ipv4: Option<Ipv4Addr>,
    ipv6: Option<Ipv6Addr>,
}

impl Host {
    pub(super) fn create(
        name: String,
        cgroup: PathBuf,
        threads_join: bool,
        (ipv4, ipv6): Pair,
    ) -> Result<Self> {
        let netns = new_netns().with_context(|| format!("network namespace of {name}"))?;
        Ok(Self { name, netns, cgroup, threads_join, ipv4, ipv6 })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cgroup in which `command` starts processes.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.ipv4
    }

    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        self.ipv6
    }

    /// The addresses it has, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.ipv4.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6)).collect()
    }

    /// The address of the family `like` has.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => self.ipv4.map(IpAddr::V4),
            IpAddr::V6(_) => self.ipv6.map(IpAddr::V6),
        }
    }

    /// A path by which other processes reach this namespace while the owner lives, for
    /// `ip link set ... netns PATH` and `nsenter --net=PATH`.
    pub fn netns_path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd())
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets and threads made
    /// there stay in it. A panic of `work` goes on in the caller. The thread stays in the
    /// caller's cgroup unless the cluster was asked for [`super::Sockets`]: use `command`
    /// where the cgroup matters.
    pub fn in_netns<R: Send>(&self, work: impl FnOnce() -> R + Send) -> io::Result<R> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name(format!("netns {}", self.name)).spawn_scoped(
                scope,
                || {
                    setns(&self.netns, CloneFlags::CLONE_NEWNET)?;
                    if self.threads_join {
                        // 0 is the writing thread itself.
                        fs::write(self.cgroup.join("cgroup.threads"), "0")?;
                    }
                    Ok(work())
                },
            )?;
            thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
        })
    }

    /// A command that will run inside the namespace and in this host's cgroup.
    pub fn command(&self, program: impl AsRef<OsStr>) -> HostCommand<'_> {
        // The shell puts itself into the cgroup and becomes the program, so that not
        // even the program's first socket belongs to another cgroup.
        let mut inner = Command::new("/bin/sh");
        inner.arg("-c").arg(r#"echo 0 > "$0" && exec "$@""#);
        inner.arg(self.cgroup.join("cgroup.procs")).arg(program);
        HostCommand { host: self, inner }
    }

    /// Runs `ip -batch` with one command a line: one process for a whole set-up.
    pub fn ip_batch(&self, script: &str) -> Result<()> {
        let output = self.in_netns(|| {
            let mut child = Command::new("ip")
                .args(["-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(script.as_bytes())?;
            }
            child.wait_with_output()
        });
        let output = output.context("run ip(8), of the package iproute2")??;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            bail!("ip -batch in {}: {}\nscript:\n{script}", self.name, message.trim());
        }
        Ok(())
    }

    /// Sets sysctls below `/proc/sys/net`, which shows the namespace of whoever looks.
    pub fn set_sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.in_netns(|| {
            for (key, value) in settings {
                let path = Path::new("/proc/sys/net").join(key);
                fs::write(&path, value)
                    .with_context(|| format!("set {} in {}", path.display(), self.name))?;
            }
            Ok(())
        })?
    }

    /// The value of a sysctl below `/proc/sys/net`, without its newline.
    pub fn sysctl(&self, key: &str) -> io::Result<String> {
        let path = Path::new("/proc/sys/net").join(key);
        self.in_netns(|| fs::read_to_string(path))?.map(|value| value.trim_end().to_owned())
    }
}

/// A fresh namespace, made on a thread that then ends: the caller's own is untouched.
fn new_netns() -> io::Result<File> {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                File::open("/proc/thread-self/ns/net")
            })
            .join()
            .unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

/// Like [`Command`], but started in the host's namespace and cgroup.
#[derive(Debug)]
pub struct HostCommand<'a> {
    host: &'a Host,
    inner: Command,
}

impl HostCommand<'_> {
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.inner.arg(arg);
        self
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.inner.args(args);
        self
    }

    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.inner.env(key, value);
        self
    }

    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.inner.stdin(stdin);
        self
    }

    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.inner.stdout(stdout);
        self
    }

    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.inner.stderr(stderr);
        self
    }

    /// Starts the process; returns once it is in its cgroup.
    pub fn spawn(mut self) -> Result<Spawned> {
        let child = self.host.in_netns(|| self.inner.spawn());
        let child = child?.with_context(|| format!("start {:?}", self.inner))?;
        let mut spawned = Spawned { child };
        // Before that the end of the cluster would not end the process.
        let members = self.host.cgroup.join("cgroup.threads");
        let id = spawned.id().to_string();
        while spawned.child.try_wait()?.is_none() {
            if fs::read_to_string(&members)?.lines().any(|member| member == id) {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(spawned)
    }

    /// Runs the process to its end and collects what it printed.
    pub fn output(mut self) -> Result<Output> {
        let output = self.host.in_netns(|| self.inner.output());
        output?.with_context(|| format!("run {:?}", self.inner))
    }

    /// Standard output of a process that must succeed.
    pub fn stdout_of(self) -> Result<String> {
        let what = format!("{:?} in {}", self.inner, self.host.name);
        let output = self.output()?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            bail!("{what}: {}: {}", output.status, message.trim());
        }
        String::from_utf8(output.stdout).with_context(|| format!("output of {what}"))
    }
}

/// A running process, killed when dropped.
#[derive(Debug)]
pub struct Spawned {
    child: Child,
}

impl Spawned {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// SIGKILL, then reaped.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }

    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        // Fails only when the process has already ended and been reaped.
        let _ = self.kill();
    }
}
