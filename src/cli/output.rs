//! Writing to standard output and standard error, and asking at a terminal.
//!
//! A reader that goes away (`pgherd events | head`) is no failure. Nothing is asked when nobody can answer.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::Context;

use crate::cli::exit::{DONE, Failure, Outcome, WRONG};

/// Writes what was asked for, as it stands.
pub fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::from(error).context("writing to standard output").into())
        }
        _ => Ok(DONE),
    }
}

/// Writes a value as JSON.
pub fn print_json<T: serde::Serialize>(value: &T) -> Outcome {
    let text = serde_json::to_string_pretty(value).context("writing JSON")?;
    print(&format!("{text}\n"))
}

/// Tells a person something on the way.
pub fn tell(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Somebody is there to be asked, or else what to add is told.
pub fn somebody_is_there(instead: &str) -> Result<(), Failure> {
    if io::stdin().is_terminal() && io::stderr().is_terminal() {
        return Ok(());
    }
    Err(Failure::new(WRONG, format!("nobody is at a terminal to confirm this: add {instead} to do it without being asked")))
}

/// Asks for a line.
pub fn ask(question: &str) -> Result<String, Failure> {
    let mut stderr = io::stderr().lock();
    let _ = write!(stderr, "{question} ");
    let _ = stderr.flush();
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).context("reading the answer")?;
    Ok(answer.trim().to_owned())
}

/// Asks for a yes, unless it was given with `--yes`.
pub fn confirm(question: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    somebody_is_there("--yes")?;
    if matches!(ask(&format!("{question} [y/N]"))?.as_str(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Failure::new(crate::cli::exit::FAILED, "not confirmed: nothing was done"))
}

/// Who types this, for records that people read: `user@host`.
pub fn who() -> String {
    let uid = nix::unistd::Uid::current();
    let user = nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
    let host = nix::unistd::gethostname().map(|host| host.to_string_lossy().into_owned()).unwrap_or_else(|_| "unknown host".to_owned());
    format!("{user}@{host}")
}
