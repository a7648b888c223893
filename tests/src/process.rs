//! Real processes: the two brokers and the small programs that act as devices and readers.

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::admin;
use crate::lab::PATIENCE;

/// Which broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Edge,
    Cloud,
}

impl Kind {
    pub fn program(self) -> &'static str {
        match self {
            Kind::Edge => "tributary-edge",
            Kind::Cloud => "tributary-cloud",
        }
    }
}

/// A broker with its configuration; running or not.
pub struct Broker {
    pub kind: Kind,
    pub config: PathBuf,
    pub admin: SocketAddr,
    pub log: PathBuf,
    pub env: Vec<(String, String)>,
    /// Words before the program, such as an emulator and its options.
    pub wrapper: Vec<String>,
    /// The program, if not the one built beside this one.
    pub program: PathBuf,
    /// Takes shards over without asking whether their owner lives.
    pub take_over: bool,
    child: Option<Child>,
}

impl Broker {
    pub fn new(kind: Kind, config: &Path, admin: SocketAddr, log: &Path) -> Result<Self> {
        Ok(Self {
            kind,
            config: config.to_owned(),
            admin,
            log: log.to_owned(),
            env: Vec::new(),
            wrapper: Vec::new(),
            program: program(kind.program())?,
            take_over: false,
            child: None,
        })
    }

    /// The command with its environment, for any subcommand.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut words = self.wrapper.iter().map(PathBuf::from).chain([self.program.clone()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).args(arguments).stdin(Stdio::null());
        // The configuration file alone decides: nothing of the caller's environment may leak in.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TRIBUTARY_") || name.starts_with("AWS_"))
        {
            command.env_remove(name);
        }
        command.env("NO_COLOR", "1").env_remove("RUST_BACKTRACE");
        command.envs(self.env.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        command
    }

    /// Starts the process; does not wait for it to be ready.
    pub fn spawn(&mut self) -> Result<()> {
        if self.child.is_some() {
            bail!("{} runs already", self.kind.program());
        }
        let log = open_log(&self.log)?;
        let config = self.config.to_string_lossy().into_owned();
        let mut command = self.command(&["run", "--config", &config]);
        if self.take_over {
            command.arg("--take-over");
        }
        command.stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("start {}", self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    /// Starts the process and waits until `/readyz` says that it serves.
    pub async fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.ready().await
    }

    /// Waits for `/readyz`; fails at once when the process ends.
    pub async fn ready(&mut self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.exited()? {
                bail!("{} ended with {status} before it was ready\n{}", self.kind.program(), self.log_tail());
            }
            if admin::is_ready(self.admin).await {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                bail!("{} not ready after {PATIENCE:?}\n{}", self.kind.program(), self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Some once the process has ended by itself.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        let status = child.try_wait()?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { bail!("{} is not running", self.kind.program()) };
        if let Some(status) = child.try_wait()? {
            bail!("{} had ended with {status} before it was killed\n{}", self.kind.program(), self.log_tail());
        }
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGSTOP: the process stands still in the midst of what it does, and its connections stay open.
    pub fn pause(&self) -> Result<()> {
        let Some(pid) = self.pid() else { bail!("{} is not running", self.kind.program()) };
        signal(pid, "STOP")
    }

    /// SIGCONT: the process goes on as if no time had passed.
    pub fn resume(&self) -> Result<()> {
        let Some(pid) = self.pid() else { bail!("{} is not running", self.kind.program()) };
        signal(pid, "CONT")
    }

    /// SIGTERM, waits, and wants exit code 0.
    pub async fn stop(&mut self) -> Result<()> {
        let Some(pid) = self.pid() else { bail!("{} is not running", self.kind.program()) };
        terminate(pid)?;
        let status = self.ended().await?;
        if !status.success() {
            bail!("{} ended with {status} on SIGTERM\n{}", self.kind.program(), self.log_tail());
        }
        Ok(())
    }

    /// Waits for the process to end by itself.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        let name = self.kind.program();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            if tokio::time::Instant::now() > deadline {
                bail!("{name} did not end within {PATIENCE:?}\n{}", self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Everything it has logged so far.
    pub fn log_text(&self) -> String {
        std::fs::read(&self.log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        format!("--- {}\n{}", self.log.display(), lines[lines.len().saturating_sub(20)..].join("\n"))
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A program of this workspace: beside this one, where the same build put it.
pub fn program(name: &str) -> Result<PathBuf> {
    let here = std::env::current_exe()?;
    let path = here.parent().context("this program has a directory")?.join(name);
    if !path.is_file() {
        bail!("{} is not built: run `cargo build --workspace --bins` first", path.display());
    }
    Ok(path)
}

pub fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(path).with_context(|| format!("open {}", path.display()))
}

/// SIGTERM.
pub fn terminate(pid: u32) -> Result<()> {
    signal(pid, "TERM")
}

/// A signal by the `kill` program: the standard library can only send SIGKILL.
pub fn signal(pid: u32, name: &str) -> Result<()> {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status()?;
    if !status.success() {
        bail!("no process {pid} to send SIG{name} to");
    }
    Ok(())
}

/// Runs a program to its end off the async threads, and returns what it printed; fails unless it ended well.
pub async fn run_to_end(mut command: Command) -> Result<Vec<u8>> {
    let shown = format!("{command:?}");
    let output = tokio::task::spawn_blocking(move || command.stdin(Stdio::null()).output()).await??;
    if !output.status.success() {
        let [said, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
        bail!("{shown}\nended with {}\n{said}{errors}", output.status);
    }
    Ok(output.stdout)
}
