//! The HTTP API over real sockets: what a stranger may cost, and that the clock alone turns leader paths to 503.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pgherd::clock::BootTime;
use pgherd::facts::cluster::{ClusterView, FailsafeRecord, MemberRole};
use pgherd::facts::failsafe::PromiseAsk;
use pgherd::facts::guard::{LockFacts, PostmasterFacts, StartId, Word};
use pgherd::facts::postgres::{Probe, ProbeOutcome, SqlFacts};
use pgherd::http::peer::{ask_promise, ask_writable};
use pgherd::http::promises::Promises;
use pgherd::http::{Limits, Server, Snapshot, start};
use pgherd::types::{Epoch, EtcdClusterId, LeaseId, LeaseIdentity, LockIdentity, Lsn, SystemId, TimelineId};
use tokio::sync::watch;

/// No test waits longer than this for anything.
const DEADLINE: Duration = Duration::from_secs(20);

/// A leader whose A comes `until_announce` from now, with a probe that stays fresh.
fn leader(until_announce: Duration) -> Snapshot {
    let now = BootTime::now();
    let mut snapshot = Snapshot::unknown(now, "mdw".parse().unwrap(), "main".parse().unwrap());
    let sql = SqlFacts {
        in_recovery: false,
        timeline: TimelineId(1),
        receive_lsn: Lsn(0x0300_0000),
        replay_lsn: Lsn(0x0300_0000),
        startup: String::new(),
        receives: false,
        replayed_all: false,
        written_by_then: Lsn(0),
        synchronous_standby_names: String::new(),
        replay_paused: false,
        walreceiver: None,
        replicas: Vec::new(),
        lowered: Vec::new(),
        no_rewind: Vec::new(),
        stopping: false,
        slots: Vec::new(),
        pending_restart: Vec::new(),
        server_version_num: 170_010,
        postmaster_start_time: "2026-11-22 12:00:00+00".to_owned(),
        system_id: SystemId(7),
    };
    snapshot.declared = true;
    snapshot.role = MemberRole::Primary;
    snapshot.loop_wait = Duration::from_secs(3600);
    snapshot.postmaster = Some(PostmasterFacts::Running { start: StartId(1), pid: 1, word: Word::Writable, adopted: false });
    snapshot.probe = Some(Probe { begun: now, outcome: ProbeOutcome::Accepting(Box::new(sql)) });
    snapshot.lock = Some(LockFacts {
        identity: LockIdentity { lease: LeaseIdentity { cluster: EtcdClusterId(1), lease: LeaseId(2) }, epoch: Epoch(3) },
        announce_at: now + until_announce,
        valid_until: now + until_announce + Duration::from_secs(5),
    });
    snapshot
}

/// A server and the sender that keeps its channel open.
fn serve(snapshot: Snapshot, limits: Limits) -> (Server, watch::Sender<Arc<Snapshot>>) {
    let (sender, receiver) = watch::channel(Arc::new(snapshot));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = Promises::new(Box::new(|_, _, _| {}));
    (start(listener, receiver, nobody, limits).unwrap(), sender)
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// Reads until the other side closes. A reset is a close; a read that times out fails the test.
fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if !matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => panic!("reading: {error}"),
        _ => String::from_utf8(bytes).unwrap(),
    }
}

/// Sends one request as HAProxy does (HTTP/1.0: the server closes), and returns all that comes back.
fn ask(address: SocketAddr, request_line: &str) -> String {
    let mut stream = connect(address);
    write!(stream, "{request_line} HTTP/1.0\r\n\r\n").unwrap();
    read_to_end(&mut stream)
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("not an answer: {answer:?}"))
}

#[test]
fn head_and_options_answer_with_a_status_and_no_body() {
    let (server, _sender) = serve(leader(DEADLINE), Limits::default());
    for (request, expected) in
        [("OPTIONS /", 200), ("OPTIONS /master", 200), ("HEAD /primary", 200), ("OPTIONS /replica", 503), ("HEAD /liveness", 503)]
    {
        let answer = ask(server.address(), request);
        assert_eq!(status(&answer), expected, "{request}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, "", "{request}");
        assert!(!head.contains("content-type"), "{request}: {head}");
    }
}

#[test]
fn a_get_carries_patronis_body_and_its_age() {
    let (server, _sender) = serve(leader(DEADLINE), Limits::default());
    let answer = ask(server.address(), "GET /primary?lag=1MB");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(status(head), 200);
    assert!(head.contains("content-type: application/json") && head.contains("x-pgherd-age-ms: "), "{head}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["role"], "primary");
}

#[test]
fn row_19_i13_a_leader_path_turns_to_503_at_a_although_no_new_snapshot_is_published() {
    let snapshot = leader(Duration::from_millis(700));
    let announce_at = snapshot.lock.unwrap().announce_at;
    let (server, _sender) = serve(snapshot, Limits::default());
    let deadline = Instant::now() + DEADLINE;
    let mut seen_before = 0;
    loop {
        let asked = BootTime::now();
        let code = status(&ask(server.address(), "OPTIONS /primary"));
        let answered = BootTime::now();
        if asked >= announce_at {
            assert_eq!(code, 503, "asked after A");
            break;
        }
        if answered < announce_at {
            assert_eq!(code, 200, "answered before A");
            seen_before += 1;
        }
        assert!(Instant::now() < deadline);
    }
    assert!(seen_before > 0, "the path never answered 200, so that its end proves nothing");
}

#[test]
fn a_new_snapshot_is_seen_by_the_next_request() {
    let (server, sender) = serve(leader(DEADLINE), Limits::default());
    assert_eq!(status(&ask(server.address(), "GET /leader")), 200);
    let mut lost = leader(DEADLINE);
    lost.lock = None;
    sender.send(Arc::new(lost)).unwrap();
    assert_eq!(status(&ask(server.address(), "GET /leader")), 503);
}

#[test]
fn what_changes_something_is_refused_with_a_sentence() {
    let (server, _sender) = serve(leader(DEADLINE), Limits::default());
    for request in ["POST /switchover", "PATCH /config", "PUT /config", "DELETE /restart", "POST /reinitialize"] {
        let answer = ask(server.address(), request);
        assert_eq!(status(&answer), 403, "{request}");
        assert!(answer.contains("pgherd switchover"), "{request}: {answer}");
    }
}

#[test]
fn a_huge_body_is_refused_without_being_read() {
    let (server, _sender) = serve(leader(DEADLINE), Limits::default());
    let mut stream = connect(server.address());
    write!(stream, "POST /switchover HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n").unwrap();
    assert_eq!(status(&read_to_end(&mut stream)), 413);
}

#[test]
fn a_body_that_never_ends_is_not_read_to_its_end() {
    let (server, _sender) = serve(leader(DEADLINE), Limits::default());
    let mut stream = connect(server.address());
    write!(stream, "POST /switchover HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
    let deadline = Instant::now() + DEADLINE;
    while stream.write_all(b"400\r\n").and_then(|()| stream.write_all(&[b'x'; 1024])).and_then(|()| stream.write_all(b"\r\n")).is_ok() {
        assert!(Instant::now() < deadline, "the server goes on reading");
    }
}

#[test]
fn a_head_that_is_too_large_is_refused() {
    let limits = Limits::default();
    let (server, _sender) = serve(leader(DEADLINE), limits);
    let mut stream = connect(server.address());
    let _ = write!(stream, "GET / HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n", "a".repeat(limits.head_bytes * 4));
    let mut start = [0; 12];
    if stream.read_exact(&mut start).is_ok() {
        assert_eq!(&start, b"HTTP/1.1 431", "or a reset, when the rest of the head was still on its way");
    }
    assert_eq!(status(&ask(server.address(), "GET /leader")), 200);
}

#[test]
fn slow_clients_are_cut_off_and_do_not_keep_others_from_being_answered() {
    let limits = Limits { header_read: Duration::from_millis(500), ..Limits::default() };
    let (server, _sender) = serve(leader(DEADLINE), limits);
    let mut slow: Vec<_> = (0..40).map(|_| connect(server.address())).collect();
    for stream in &mut slow {
        stream.write_all(b"GET /primary HTTP/1.1\r\nX-Slow: ").unwrap();
    }
    assert_eq!(status(&ask(server.address(), "GET /primary")), 200, "while all of them hang");
    for stream in &mut slow {
        let answer = read_to_end(stream);
        assert!(answer.is_empty() || status(&answer) == 408, "{answer}");
    }
}

#[test]
fn connections_above_the_limit_are_closed_and_places_come_back() {
    let limits = Limits { connections_per_address: 4, ..Limits::default() };
    let (server, _sender) = serve(leader(DEADLINE), limits);
    // A connection has its place for certain once it was answered.
    let held: Vec<_> = (0..limits.connections_per_address)
        .map(|_| {
            let mut stream = connect(server.address());
            stream.write_all(b"OPTIONS /primary HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            stream.read_exact(&mut [0; 12]).unwrap();
            stream
        })
        .collect();
    assert_eq!(read_to_end(&mut connect(server.address())), "", "one too many");
    drop(held);
    let deadline = Instant::now() + DEADLINE;
    while !try_ask(server.address()) {
        assert!(Instant::now() < deadline, "the places of closed connections were not given back");
    }
}

/// Whether a request is answered; a connection that is closed unanswered is no failure here.
fn try_ask(address: SocketAddr) -> bool {
    let mut stream = connect(address);
    stream.write_all(b"OPTIONS /primary HTTP/1.0\r\n\r\n").is_ok() && read_to_end(&mut stream).starts_with("HTTP/1.0 200")
}

#[test]
fn a_connection_ends_with_its_life_however_busy_it_is() {
    let limits = Limits { connection_life: Duration::from_millis(300), ..Limits::default() };
    let (server, _sender) = serve(leader(DEADLINE), limits);
    let mut stream = connect(server.address());
    let deadline = Instant::now() + DEADLINE;
    let mut answered = 0;
    loop {
        let sent = stream.write_all(b"OPTIONS /primary HTTP/1.1\r\nHost: x\r\n\r\n");
        match sent.and_then(|()| stream.read(&mut [0; 1024])) {
            Ok(0) | Err(_) => break,
            Ok(_) => answered += 1,
        }
        assert!(Instant::now() < deadline, "still open");
    }
    assert!(answered > 0);
}

#[tokio::test]
async fn a_peer_that_may_be_writable_says_so() {
    let (server, _sender) = serve(leader(DEADLINE), Limits::default());
    let answer = ask_writable(&format!("http://{}/", server.address()), DEADLINE).await.unwrap();
    assert_eq!((answer.member.as_str(), answer.writable, answer.epoch), ("mdw", Some(true), Some(Epoch(3))));
}

#[tokio::test]
async fn a_peer_that_does_not_answer_is_an_error_and_never_a_no() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let error = ask_writable(&address, Duration::from_millis(50)).await.unwrap_err();
    assert!(error.to_string().contains("did not answer within 50 ms"), "{error:#}");
    drop(silent);
    assert!(ask_writable(&address, DEADLINE).await.is_err(), "nobody listens there");
    assert!(ask_writable("not an address", DEADLINE).await.is_err());
}

fn call() -> PromiseAsk {
    PromiseAsk {
        cluster: "main".parse().unwrap(),
        to: "mdw".parse().unwrap(),
        member: "standby".parse().unwrap(),
        epoch: Epoch(3),
        lease: LeaseId(2),
        ttl_s: 10,
    }
}

/// A machine that answers each call at once, in another thread, as it is told to; None = not at all.
fn serve_promises(answer: impl Fn(&PromiseAsk) -> Option<Result<(), String>> + Send + 'static) -> (Server, watch::Sender<Arc<Snapshot>>) {
    let (handed, calls) = channel::<(u64, PromiseAsk)>();
    let handed = Mutex::new(handed);
    let promises = Promises::new(Box::new(move |id, ask, received| {
        assert!(received <= BootTime::now());
        handed.lock().unwrap().send((id, ask)).unwrap();
    }));
    let machine = Arc::clone(&promises);
    std::thread::spawn(move || {
        while let Ok((id, ask)) = calls.recv() {
            if let Some(result) = answer(&ask) {
                machine.answer(id, result);
            }
        }
    });
    let (sender, receiver) = watch::channel(Arc::new(leader(DEADLINE)));
    (start(TcpListener::bind("127.0.0.1:0").unwrap(), receiver, promises, Limits::default()).unwrap(), sender)
}

async fn promises(server: &Server, ask: &PromiseAsk) -> Result<(), String> {
    ask_promise(&format!("http://{}", server.address()), ask, DEADLINE).await.map_err(|error| format!("{error:#}"))
}

#[tokio::test]
async fn a_leader_without_etcd_gets_the_machines_promise_or_its_reason() {
    let (server, _sender) = serve_promises(|ask| Some(if ask.epoch == Epoch(3) { Ok(()) } else { Err("another leadership".to_owned()) }));
    assert_eq!(promises(&server, &call()).await, Ok(()));
    let refused = promises(&server, &PromiseAsk { epoch: Epoch(4), ..call() }).await.unwrap_err();
    assert!(refused.contains("500") && refused.contains("another leadership"), "{refused}");
}

#[tokio::test]
async fn a_call_for_another_cluster_never_reaches_the_machine() {
    let (server, _sender) = serve_promises(|ask| panic!("{ask:?}"));
    let refused = promises(&server, &PromiseAsk { cluster: "other".parse().unwrap(), ..call() }).await.unwrap_err();
    assert!(refused.contains("a member of the cluster `main`"), "{refused}");
}

#[tokio::test]
async fn a_machine_that_hangs_promises_nothing() {
    let (server, _sender) = serve_promises(|_| None);
    let asked = Instant::now();
    let unanswered = promises(&server, &call()).await.unwrap_err();
    assert!(unanswered.contains("503") && unanswered.contains("did not decide"), "{unanswered}");
    assert!(asked.elapsed() >= Limits::default().call, "it was given its time");
}

#[tokio::test]
async fn an_answer_of_anybody_else_is_no_promise() {
    let (server, _sender) = serve_promises(|_| Some(Ok(())));
    // Every path but the one: answered by whoever listens there, with whatever status.
    let elsewhere = format!("http://{}/health", server.address());
    assert!(ask_promise(&elsewhere, &call(), DEADLINE).await.is_err());
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", nobody.local_addr().unwrap());
    assert!(ask_promise(&silent, &call(), Duration::from_millis(50)).await.unwrap_err().to_string().contains("within 50 ms"));
}

#[tokio::test]
async fn calls_beyond_the_limit_are_turned_away_while_the_machine_hangs() {
    let (server, _sender) = serve_promises(|_| None);
    let ask = call();
    let calls: Vec<_> = (0..20).map(|_| promises(&server, &ask)).collect();
    let answers = futures_util::future::join_all(calls).await;
    let turned_away = answers.iter().filter(|answer| answer.as_ref().is_err_and(|why| why.contains("16 such calls"))).count();
    assert_eq!(turned_away, 4, "{answers:?}");
    let turned_away = promises(&server, &ask).await.unwrap_err();
    assert!(turned_away.contains("did not decide"), "places come back: {turned_away}");
}

#[test]
fn a_body_that_is_no_call_is_refused() {
    let (server, _sender) = serve_promises(|ask| panic!("{ask:?}"));
    for (body, code) in [("", 400), ("{}", 400), ("[1]", 400), (&*"x".repeat(5_000), 413)] {
        let mut stream = connect(server.address());
        write!(stream, "POST /failsafe HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        assert_eq!(status(&read_to_end(&mut stream)), code, "{body:.20}");
    }
    // A body that never comes is not waited for.
    let mut stream = connect(server.address());
    write!(stream, "POST /failsafe HTTP/1.0\r\nContent-Length: 100\r\n\r\n").unwrap();
    assert_eq!(status(&read_to_end(&mut stream)), 408);
}

#[test]
fn who_has_to_promise_is_told_while_failsafe_is_in_force() {
    let (server, sender) = serve(leader(DEADLINE), Limits::default());
    assert_eq!(status(&ask(server.address(), "GET /failsafe")), 502);
    let members = ["mdw", "standby"].map(|member| (member.parse().unwrap(), format!("http://{member}:8008")));
    let view = ClusterView { failsafe: Some(FailsafeRecord { ttl_s: 10, members: members.into() }), ..ClusterView::default() };
    let mut in_force = leader(DEADLINE);
    in_force.view = Some((BootTime::now(), Arc::new(view)));
    in_force.etcd_reachable = false;
    sender.send(Arc::new(in_force.clone())).unwrap();
    let answer = ask(server.address(), "GET /failsafe");
    assert_eq!(status(&answer), 200, "also while etcd is away");
    let body: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(body, serde_json::json!({ "mdw": "http://mdw:8008", "standby": "http://standby:8008" }));

    let active = |server: &Server| {
        let metrics = ask(server.address(), "GET /metrics");
        let line = metrics.lines().find(|line| line.starts_with("patroni_failsafe_mode_is_active{")).unwrap().to_owned();
        let body = ask(server.address(), "GET /patroni");
        assert_eq!(line.ends_with(" 1"), body.contains("\"failsafe_mode_is_active\":true"));
        line.ends_with(" 1")
    };
    assert!(!active(&server));
    in_force.sustained = Some(BootTime::now() + DEADLINE);
    sender.send(Arc::new(in_force)).unwrap();
    assert!(active(&server), "it leads by the promises of the others");
}
