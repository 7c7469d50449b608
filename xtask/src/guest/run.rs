//! Booting a guest, following its output, and telling how it ended.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::initramfs;
use super::kernel::{Kernel, Tree};
use super::labelled::Labelled;
use crate::shell;

const BOOT: &str = include_str!("boot.sh");

/// How often the guest's output is looked at: too short to be felt, too long to cost.
const POLL: Duration = Duration::from_millis(20);

/// How long the guest may take from its exit code to power off before it is ended.
const POWER_OFF: Duration = Duration::from_secs(3);

/// How much of the guest's console a message shows, in lines.
const CONSOLE_TAIL: usize = 40;

/// What to run, and in what.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The kernel to boot.
    pub kernel: Kernel,
    /// MiB of memory; files written in the guest live in it too.
    pub memory: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// The guest is ended when it has not finished by then.
    pub timeout: Duration,
    /// A directory of this machine that the guest may write to, at the same path.
    pub out: Option<PathBuf>,
    /// Environment of the command beyond `PATH`, `HOME` and the `PROXY_VM*` variables.
    pub env: Vec<(String, OsString)>,
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// Where the command runs.
    pub cwd: PathBuf,
    /// Before each line of its output; empty for a guest that runs alone.
    pub label: String,
}

/// How a guest ended.
#[derive(Debug)]
pub struct Outcome {
    /// The command's exit code.
    pub code: u8,
    /// What the command wrote to stdout.
    pub stdout: Vec<u8>,
}

impl Spec {
    /// A guest of the usual size for `command` in the present directory.
    ///
    /// # Errors
    /// When the present directory is gone.
    pub fn new(kernel: Kernel, command: Vec<OsString>) -> Result<Self> {
        Ok(Self {
            kernel,
            memory: 2048,
            cpus: 2,
            timeout: Duration::from_secs(600),
            out: None,
            env: Vec::new(),
            command,
            cwd: std::env::current_dir().context("the present directory is gone")?,
            label: String::new(),
        })
    }

    /// Boots the guest, copies the command's output to ours as it comes, and waits.
    ///
    /// # Errors
    /// When the guest cannot be started, does not come up, panics or exceeds its time: the
    /// message holds the end of its console. A command that fails is an `Outcome`.
    pub fn run(&self) -> Result<Outcome> {
        let tree = self.kernel.ensure()?;
        let initramfs = initramfs::ensure(&tree)?;
        let control = tempfile::Builder::new().prefix("proxy-vm-").tempdir()?;
        self.write_control(control.path(), &tree)?;
        eprintln!(
            "vm: booting {} ({} CPUs, {} MiB): {}",
            tree.release,
            self.cpus,
            self.memory,
            self.command.join(OsStr::new(" ")).to_string_lossy(),
        );
        let start = Instant::now();
        let qemu = self
            .qemu(&tree, &initramfs, control.path())?
            .spawn()
            .context("cannot start qemu-system-x86_64 (package qemu-system-x86)")?;
        let mut guest = Running {
            qemu,
            stdout: Tail::new(control.path().join("stdout")),
            stderr: Tail::new(control.path().join("stderr")),
            control: control.path().to_owned(),
        };
        let code = guest.follow(&self.label, start, self.timeout)?;
        let took = start.elapsed();
        eprintln!("vm: exit code {code} after {:.1} s", took.as_secs_f64());
        guest.report_kernel_warnings();
        Ok(Outcome { code, stdout: std::mem::take(&mut guest.stdout.seen) })
    }

    fn write_control(&self, dir: &Path, tree: &Tree) -> Result<()> {
        let out = match &self.out {
            Some(out) => {
                fs::create_dir_all(out)
                    .with_context(|| format!("cannot make {}", out.display()))?;
                Some(out.canonicalize()?)
            }
            None => None,
        };
        let mut settings = Vec::new();
        assign(&mut settings, "VM_MODULES", tree.modules().as_os_str());
        assign(&mut settings, "VM_HOSTNAME", OsStr::new("guest"));
        let out = out.as_deref().map(Path::as_os_str);
        assign(&mut settings, "VM_OUT", out.unwrap_or_default());
        fs::write(dir.join("settings"), settings)?;

        let mut script = Vec::new();
        let kernel = OsString::from(self.kernel.to_string());
        let home = std::env::var_os("HOME").unwrap_or_else(|| "/root".into());
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut fixed = vec![
            ("HOME", home.as_os_str()),
            ("PATH", path.as_os_str()),
            ("LC_ALL", OsStr::new("C.UTF-8")),
            ("TERM", OsStr::new("dumb")),
            ("RUST_BACKTRACE", OsStr::new("1")),
            ("PROXY_VM", OsStr::new("1")),
            ("PROXY_VM_KERNEL", kernel.as_os_str()),
        ];
        fixed.extend(out.map(|out| ("PROXY_VM_OUT", out)));
        let given = self.env.iter().map(|(key, value)| (key.as_str(), value.as_os_str()));
        for (key, value) in fixed.into_iter().chain(given) {
            script.extend_from_slice(b"export ");
            assign(&mut script, key, value);
        }
        script.extend_from_slice(b"cd ");
        script.extend_from_slice(&quoted(self.cwd.as_os_str()));
        script.extend_from_slice(b" && exec");
        for word in &self.command {
            script.push(b' ');
            script.extend_from_slice(&quoted(word));
        }
        script.push(b'\n');
        fs::write(dir.join("run.sh"), script)?;
        fs::write(dir.join("boot.sh"), BOOT)?;
        for file in ["stdout", "stderr", "console"] {
            File::create(dir.join(file))?;
        }
        Ok(())
    }

    fn qemu(&self, tree: &Tree, initramfs: &Path, control: &Path) -> Result<Command> {
        let qemu = shell::find("qemu-system-x86_64")
            .context("qemu-system-x86_64 is missing: `cargo xtask setup` installs it")?;
        // The guest ends with us, however we end.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(qemu);
        command.args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]);
        // KVM inside a virtual machine may hang the guest; emulation works everywhere.
        command.args(["-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max"]);
        command.args(["-m", &format!("{}M", self.memory), "-smp", &self.cpus.to_string()]);
        // QEMU's user-mode network would answer for addresses that do not exist.
        command.args(["-nic", "none"]);
        command.arg("-kernel").arg(tree.image()).arg("-initrd").arg(initramfs);
        command.args(["-append", &kernel_arguments()]);
        let console = control.join("console");
        command.arg("-serial").arg(format!("file:{}", console.display()));
        share(&mut command, "root", Path::new("/"), Access::ReadOnly)?;
        share(&mut command, "ctl", control, Access::Write)?;
        if let Some(out) = &self.out {
            share(&mut command, "out", &out.canonicalize()?, Access::Write)?;
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(command)
    }
}

/// A panic, also after an oops, ends QEMU at once (`panic=-1` with `-no-reboot`).
/// Speculation mitigations only cost time under emulation; `tsc=reliable` keeps a loaded
/// machine from making the guest distrust its clock and fall back to a slow one.
fn kernel_arguments() -> String {
    "console=ttyS0 loglevel=5 panic=-1 oops=panic rdinit=/init mitigations=off tsc=reliable \
     apparmor=0 audit=0 cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1"
        .to_owned()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    ReadOnly,
    Write,
}

fn share(command: &mut Command, tag: &str, path: &Path, access: Access) -> Result<()> {
    let Some(path) = path.to_str().filter(|path| !path.contains(',')) else {
        bail!("QEMU cannot share {}: a comma or an odd byte in its path", path.display());
    };
    let mut option =
        format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap");
    if access == Access::ReadOnly {
        option.push_str(",readonly=on");
    }
    command.args(["-virtfs", &option]);
    Ok(())
}

fn assign(script: &mut Vec<u8>, key: &str, value: &OsStr) {
    script.extend_from_slice(key.as_bytes());
    script.push(b'=');
    script.extend_from_slice(&quoted(value));
    script.push(b'\n');
}

/// One word of a POSIX shell, whatever bytes it holds.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut text = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => text.extend_from_slice(br"'\''"),
            other => text.push(*other),
        }
    }
    text.push(b'\'');
    text
}

/// A file of the control directory that the guest appends to.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    file: Option<File>,
    seen: Vec<u8>,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None, seen: Vec::new() }
    }

    /// Passes on what came since the last call.
    fn copy(&mut self, to: &mut impl Write) -> Result<()> {
        if self.file.is_none() {
            self.file = Some(File::open(&self.path).context("the guest's output file is gone")?);
        }
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let from = self.seen.len();
        file.read_to_end(&mut self.seen).context("cannot read the guest's output")?;
        if self.seen.len() > from {
            to.write_all(&self.seen[from..]).and_then(|()| to.flush()).context("cannot write")?;
        }
        Ok(())
    }
}

/// A guest that has been started; dropping it ends it.
#[derive(Debug)]
struct Running {
    qemu: Child,
    control: PathBuf,
    stdout: Tail,
    stderr: Tail,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Running {
    fn follow(&mut self, label: &str, start: Instant, timeout: Duration) -> Result<u8> {
        let mut stdout = Labelled::new(label, start, std::io::stdout());
        let mut stderr = Labelled::new(label, start, std::io::stderr());
        let result = self.copy_until_the_end(&mut stdout, &mut stderr, start, timeout);
        // The result counts, not what could not be shown.
        let _ = stdout.end().and_then(|()| stderr.end());
        result
    }

    fn copy_until_the_end(
        &mut self,
        stdout: &mut impl Write,
        stderr: &mut impl Write,
        start: Instant,
        timeout: Duration,
    ) -> Result<u8> {
        loop {
            // Asked before reading: what was written before the end is then still read.
            let ended = self.qemu.try_wait().context("cannot wait for QEMU")?.is_some();
            let code = fs::read_to_string(self.control.join("exit")).ok();
            self.stdout.copy(stdout)?;
            self.stderr.copy(stderr)?;
            if let Some(code) = code {
                self.let_power_off();
                let text = code.trim();
                return text.parse().with_context(|| format!("odd exit code {text:?}"));
            }
            if ended {
                bail!("{}", self.why_it_ended());
            }
            if start.elapsed() > timeout {
                bail!(
                    "the guest did not finish within {} s and was ended (--timeout); the end of \
                     its console:\n{}",
                    timeout.as_secs(),
                    self.console_tail(),
                );
            }
            sleep(POLL);
        }
    }

    fn let_power_off(&mut self) {
        let deadline = Instant::now() + POWER_OFF;
        while Instant::now() < deadline && matches!(self.qemu.try_wait(), Ok(None)) {
            sleep(POLL);
        }
    }

    fn why_it_ended(&self) -> String {
        let console = self.console();
        let started = self.control.join("started").exists();
        let why = if let Ok(error) = fs::read_to_string(self.control.join("init-error")) {
            format!("the guest did not come up: {}", error.trim())
        } else if let Some(line) = console.lines().find(|line| line.contains("Kernel panic")) {
            format!("the guest's kernel panicked: {}", line.trim())
        } else if started {
            "the guest powered off before the command ended".to_owned()
        } else {
            "the guest did not come up".to_owned()
        };
        format!("{why}; the end of its console:\n{}", self.console_tail())
    }

    fn console(&self) -> String {
        let bytes = fs::read(self.control.join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn console_tail(&self) -> String {
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_TAIL)..].iter().fold(
            String::new(),
            |mut text, line| {
                let _ = writeln!(text, "  | {line}");
                text
            },
        )
    }

    /// A kernel that complains about its own state is a finding even when the command
    /// succeeded.
    fn report_kernel_warnings(&self) {
        let marks = ["WARNING: CPU", "BUG:", "refcount_t:", "possible recursive locking"];
        for line in self.console().lines() {
            if marks.iter().any(|mark| line.contains(mark)) {
                eprintln!("vm: kernel warning: {}", line.trim());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_the_shell() {
        for word in ["plain", "it's", "a b\n$HOME `x` \"q\" \\", "", "'"] {
            let script = [b"printf %s ".to_vec(), quoted(OsStr::new(word))].concat();
            let out =
                Command::new("/bin/sh").arg("-c").arg(OsStr::from_bytes(&script)).output().unwrap();
            assert_eq!(String::from_utf8(out.stdout).unwrap(), word);
        }
    }

    #[test]
    fn a_path_that_would_split_the_option_is_refused() {
        let mut command = Command::new("true");
        assert!(share(&mut command, "x", Path::new("/a,readonly=off"), Access::Write).is_err());
    }
}
