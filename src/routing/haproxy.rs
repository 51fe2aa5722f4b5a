//! HAProxy's runtime socket: one line of commands for each connection, within a time and a size.
//!
//! What surprises: HAProxy reports errors as text, where success is an empty line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::facts::routing::{Backend, Server, ServerState};
use crate::policy::routing::Order;

/// How long one exchange may take.
const EXCHANGE_TIMEOUT_MS: u64 = 500;
/// Most bytes of an answer: a server takes about 100.
const ANSWER_MAX_BYTES: u64 = 256 * 1024;
/// Orders in one line: HAProxy takes up to 16 KiB of it.
const ORDERS_MAX: usize = 64;
/// The one version of `show servers state` there is; columns are only added.
const STATE_VERSION: &str = "1";
/// `srv_op_state` of a server that gets no sessions.
const STOPPED: &str = "0";
/// `srv_admin_state` of a server that nobody has set aside.
const NOT_SET_ASIDE: &str = "0";
/// Bits of `srv_check_state`: its check is switched on, and paused.
const CHECK_ENABLED: u32 = 0x04;
/// See [`CHECK_ENABLED`].
const CHECK_PAUSED: u32 = 0x08;

/// The socket.
pub struct RuntimeSocket {
    path: PathBuf,
}

impl RuntimeSocket {
    /// Connects to nothing yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the servers of our backends stand. Backends that are not there, and servers without a member's name, are left out.
    pub async fn servers(&self) -> anyhow::Result<Vec<Server>> {
        let line = Backend::ALL.map(|backend| format!("show servers state {}", backend.name())).join(";");
        servers(&self.exchange(&line).await?)
    }

    /// Gives these orders.
    pub async fn tell(&self, orders: &[Order]) -> anyhow::Result<()> {
        for part in orders.chunks(ORDERS_MAX) {
            let commands: Vec<String> = part.iter().map(command).collect();
            tracing::info!(socket = %self.path.display(), "HAProxy is told: {}", commands.join("; "));
            let answer = self.exchange(&commands.join(";")).await?;
            if let Some(refused) = answer.lines().find(|line| !line.trim().is_empty()) {
                bail!("it answered `{}`; its socket has to be one of `level admin`", refused.escape_debug());
            }
        }
        Ok(())
    }

    async fn exchange(&self, line: &str) -> anyhow::Result<String> {
        let answer = tokio::time::timeout(Duration::from_millis(EXCHANGE_TIMEOUT_MS), self.ask(line)).await;
        answer.with_context(|| format!("it did not answer within {EXCHANGE_TIMEOUT_MS} ms"))?
    }

    async fn ask(&self, line: &str) -> anyhow::Result<String> {
        let mut stream = UnixStream::connect(&self.path).await.context("connecting")?;
        stream.write_all(format!("{line}\n").as_bytes()).await.context("writing")?;
        let mut answer = Vec::new();
        stream.take(ANSWER_MAX_BYTES + 1).read_to_end(&mut answer).await.context("reading")?;
        ensure!(answer.len() as u64 <= ANSWER_MAX_BYTES, "it answered more than {ANSWER_MAX_BYTES} bytes");
        String::from_utf8(answer).context("it answered something that is not text")
    }
}

/// Names of backends are ours and those of members have only letters, digits, `-` and `_`: nothing in them ends a command.
fn command(order: &Order) -> String {
    match order {
        Order::Down(backend, member) => format!("set server {}/{member} health down", backend.name()),
        Order::Up(backend, member) => format!("set server {}/{member} health up", backend.name()),
        Order::Cut(member) => format!("shutdown sessions server {}/{member}", Backend::Primary.name()),
    }
}

/// Reads the answer to `show servers state`, for one backend or several.
fn servers(answer: &str) -> anyhow::Result<Vec<Server>> {
    let mut columns: Vec<&str> = Vec::new();
    let mut servers = Vec::new();
    let mut version = None;
    for line in answer.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(head) = line.strip_prefix("# ") {
            columns = head.split(' ').collect();
            continue;
        }
        let values: Vec<&str> = line.split(' ').collect();
        match values.as_slice() {
            [number] => version = Some(*number),
            _ if line.starts_with("Can't find backend") => {}
            _ if version.is_none() => bail!("it answered `{}`", line.chars().take(200).collect::<String>().escape_debug()),
            values => servers.extend(server(&columns, values)?),
        }
    }
    ensure!(version.is_none_or(|version| version == STATE_VERSION), "it describes its servers in an unknown way (version {version:?})");
    Ok(servers)
}

fn server(columns: &[&str], values: &[&str]) -> anyhow::Result<Option<Server>> {
    let value = |column: &str| {
        let at = columns.iter().position(|name| *name == column);
        at.and_then(|at| values.get(at)).copied().with_context(|| format!("it does not say the {column} of its servers"))
    };
    let name = value("be_name")?;
    let Some(backend) = Backend::ALL.into_iter().find(|backend| backend.name() == name) else { return Ok(None) };
    let Ok(member) = value("srv_name")?.parse() else { return Ok(None) };
    let check: u32 = value("srv_check_state")?.parse().context("reading srv_check_state")?;
    let state = if value("srv_admin_state")? != NOT_SET_ASIDE {
        ServerState::ByHand
    } else if check & CHECK_ENABLED == 0 || check & CHECK_PAUSED != 0 {
        ServerState::Unchecked
    } else if value("srv_op_state")? == STOPPED {
        ServerState::Down
    } else {
        ServerState::Up
    };
    Ok(Some(Server { backend, member, state }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight \
                        srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state srv_agent_state\n";

    #[test]
    fn how_servers_stand_is_read_as_haproxy_2_6_says_it() {
        let answer = format!(
            "{HEAD}2 primary 1 n1 127.0.0.1 2 0 1 1 15 3 2 6 6 0\n2 primary 2 n2 127.0.0.1 0 0 1 1 1 0 1 0 7 0\n2 primary 3 n3 - 0 1 1 1 1 0 1 0 6 \
             0\n2 primary 4 n4 - 2 0 1 1 1 0 1 0 0 0\n2 primary 5 not.ours - 2 0 1 1 1 0 1 0 6 0\n\nCan't find backend.\n\n"
        );
        let read: Vec<_> = servers(&answer).unwrap().into_iter().map(|server| (server.member.to_string(), server.state)).collect();
        let expected = [("n1", ServerState::Up), ("n2", ServerState::Down), ("n3", ServerState::ByHand), ("n4", ServerState::Unchecked)];
        assert_eq!(read, expected.map(|(name, state)| (name.to_owned(), state)));
    }

    #[test]
    fn what_is_no_list_of_servers_is_an_error_and_not_an_empty_list() {
        assert!(servers("Permission denied\n\n").unwrap_err().to_string().contains("Permission denied"));
        assert!(servers(&HEAD.replace("1\n#", "2\n#")).is_err(), "another version");
        assert!(servers("1\n# be_id be_name srv_id srv_name\n2 primary 1 n1\n").is_err(), "a column is missing");
        assert_eq!(servers("Can't find backend.\n\nCan't find backend.\n\n").unwrap(), []);
    }

    /// A socket at which somebody answers so, or says nothing.
    fn somebody(answer: Option<Vec<u8>>) -> (tempfile::TempDir, RuntimeSocket) {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut line = [0; 4096];
                let _ = stream.read(&mut line).await;
                match &answer {
                    Some(answer) => drop(stream.write_all(answer).await),
                    None => kept.push(stream),
                }
            }
        });
        (place, RuntimeSocket::new(path))
    }

    #[tokio::test]
    async fn an_haproxy_that_hangs_talks_without_end_or_refuses_is_an_error() {
        let orders = [Order::Cut("n1".parse().unwrap())];
        let error = |answer: Option<Vec<u8>>| {
            let orders = &orders;
            async move {
                let (_place, socket) = somebody(answer);
                format!("{:#}", socket.tell(orders).await.unwrap_err())
            }
        };
        assert!(error(None).await.contains("did not answer within"));
        assert!(error(Some(vec![b'x'; ANSWER_MAX_BYTES as usize + 100])).await.contains("more than"));
        assert!(error(Some(b"Permission denied\n\n".to_vec())).await.contains("level admin"));
        let (_place, socket) = somebody(Some(b"\n\n".to_vec()));
        socket.tell(&orders).await.unwrap();
    }
}
