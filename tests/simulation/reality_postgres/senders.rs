//! Walsenders of a standby that says nothing any more.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgherd::types::Lsn;
use std::process::{Command, Stdio};

use super::harness::eventually_async;
use super::twins::Twins;

impl Twins {
    /// The walsenders of a primary, which both have alike: to whom, in which state, and whether what was flushed is behind what is written.
    async fn walsenders(&mut self, host: usize) -> String {
        let row = "format('%s %s %s', application_name, state, case when flush_lsn < pg_current_wal_lsn() then 'behind' else 'all' end)";
        let real = self.servers[host].ask(&format!("select coalesce(string_agg({row}, ', '), '') from pg_stat_replication")).await;
        self.sim.look_after_walsenders(host);
        let end = self.sim.hosts[host].server.data.as_ref().unwrap().wal.end;
        let rows = self.sim.walsenders_of(host).into_iter().map(|row| {
            let behind = if row.flush_lsn.unwrap_or(Lsn(0)) < end { "behind" } else { "all" };
            format!("{} {} {behind}", row.application_name, row.state)
        });
        let model = rows.collect::<Vec<_>>().join(", ");
        assert_eq!(real, model, "walsenders: real and model");
        model
    }
}

/// Somebody else under the name of `b`, by its slot or without one.
fn receives_as_b(twins: &Twins, slot: Option<&str>) -> Command {
    let server = &twins.servers[0];
    let into = server.layout.data_dir().parent().unwrap().join("received");
    std::fs::create_dir_all(&into).unwrap();
    let mut command = Command::new(server.installation.program("pg_receivewal"));
    command.env("PGAPPNAME", "b").args(["--no-loop", "-U", "postgres", "-h", &server.inputs.socket_dir, "-p", &server.port.to_string()]);
    command.arg("-D").arg(into).args(slot.iter().flat_map(|slot| ["-S", slot]));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Row 10: it is there still, with what it flushed last, and keeps the slot from others; who comes without the slot is beside it.
pub async fn half_open(mut twins: Twins) {
    twins.sim.is_synchronous = true;
    twins.primary(0).await;
    twins.servers[0].run("select pg_create_physical_replication_slot('b', true)").await;
    twins.servers[1].inputs.primary_slot_name = Some("b".to_owned());
    let end = twins.model_data(0).wal.end;
    twins.model_data(0).slots.insert("b".to_owned(), end);
    twins.sim.hosts[1].server.slot_on_disk = true;
    twins.standby_of(1, 0).await;
    eventually_async(async || {
        twins.servers[0].ask("select (flush_lsn = pg_current_wal_lsn())::text from pg_stat_replication").await == "true"
    })
    .await;
    twins.model_until("it has flushed all", |sim| sim.walsenders_are_done(0));
    assert_eq!(twins.walsenders(0).await, "b streaming all");

    let receiver = Pid::from_raw(twins.servers[1].ask("select pid::text from pg_stat_wal_receiver").await.parse().unwrap());
    kill(receiver, Signal::SIGSTOP).unwrap();
    twins.sim.hosts[1].stands = true;
    twins.commit(0).await;
    twins.model_goes_on(1);
    assert_eq!(twins.walsenders(0).await, "b streaming behind");

    let refused = receives_as_b(&twins, Some("b")).output().unwrap();
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("replication slot \"b\" is active for PID"), "{why}");
    assert_eq!(twins.sim.walsender_starts(0, 1, None), None, "the model lets it in");

    let mut beside = receives_as_b(&twins, None).spawn().unwrap();
    let count = "select count(*)::text from pg_stat_replication where application_name = 'b'";
    eventually_async(async || twins.servers[0].ask(count).await == "2").await;
    twins.sim.hosts[1].server.postmaster.as_mut().unwrap().by_slot = false;
    assert!(twins.sim.walsender_starts(0, 1, None).is_some());
    assert_eq!(twins.sim.walsenders_of(0).len(), 2);
    beside.kill().unwrap();
    beside.wait().unwrap();
    twins.sim.hosts[0].server.postmaster.as_mut().unwrap().synchronous.senders.pop();

    kill(receiver, Signal::SIGCONT).unwrap();
    twins.sim.hosts[1].stands = false;
    twins.caught_up(1, 0).await;
    twins.stop(1);
    eventually_async(async || twins.servers[0].ask("select active::text from pg_replication_slots").await == "false").await;
    assert_eq!(twins.walsenders(0).await, "");
    assert!(!twins.sim.is_active(0, "b"));
}
