//! Three nodes of all roles form one cluster by themselves, and lose nothing that was
//! acknowledged, whatever happens to them.

#[allow(dead_code, reason = "other tests steer the cluster elsewhere")]
#[path = "support/ha.rs"]
mod ha;
#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;
#[path = "ha/newcomer.rs"]
mod newcomer;
#[path = "ha/power.rs"]
mod power;
#[path = "ha/services.rs"]
mod services;
#[allow(dead_code, reason = "other tests load the edges")]
#[path = "support/users.rs"]
mod users;

use std::time::{Duration, Instant};

use ha::report::{Line, Report, find_longest_pause, find_return};
use ha::{ALL_PORT, Ha, LEADER_PORT, REPLICA_PORT, WHOLE};
use stanchion::lab::ledger::{Record, read_ledger};

/// The events of one cluster's life, each with all clients at work; whole before each.
#[test]
fn a_cluster_forms_itself_and_survives_what_happens_to_its_nodes() {
    let Some(ha) = Ha::create("ha", |_| {}) else { return };
    let mut report = Report::default();
    let turn = ha::wait_turn();
    let began = Instant::now();
    ha.start_all();
    let ledger = ha.write();
    ledger.wait_for_write(Duration::from_secs(180)).unwrap_or_else(|error| {
        ha.show_nodes();
        panic!("{error:#}");
    });
    let first = began.elapsed().as_secs_f64();
    report.check("cold start", "first write", Some(first), 20.0);
    report.push(Line {
        scenario: "cold start",
        writes: Some(first),
        vip: None,
        redis: None,
        lost: 0,
    });
    drop(ledger);
    eprintln!("whole after {:.1} s", ha.wait_until_whole().as_secs_f64() + first);
    drop(turn);

    services::look_at_services(&ha);
    kill_the_busiest_node(&ha, &mut report);
    cut_the_leader_off(&ha, &mut report);
    switch_over(&ha, &mut report);
    refuse_writes_on_a_replica(&ha);
    replace_a_node(&ha, &mut report);
    lose_two_of_three(&ha, &mut report);
    report.finish();
}

/// A machine of which the cluster file knows nothing comes and goes; the power goes.
#[test]
fn a_cluster_takes_in_a_newcomer_and_outlives_losses_of_power() {
    let created = Ha::create_with("power", |_| {}, |_, _| {}, newcomer::describe);
    let Some(ha) = created else { return };
    let mut report = Report::default();
    ha.form();
    newcomer::join_serve_and_leave(&ha);
    power::lose_power_and_start_in_any_order(&ha, &mut report);
    report.finish();
}

/// The node that is leader, Redis master and VIP holder at once.
fn kill_the_busiest_node(ha: &Ha, report: &mut Report) {
    const SCENARIO: &str = "kill of the busiest node";
    let victim = ha.gather_everything();
    let (ledger, vip, redis) = (ha.write(), ha.watch_vip(), ha.write_redis());
    ledger.wait_for_write(Duration::from_secs(30)).unwrap();
    std::thread::sleep(Duration::from_secs(2));

    let event = Instant::now();
    ha.lab.kill(&victim).unwrap();
    std::thread::sleep(Duration::from_secs(30));
    let record = ledger.stop();
    let line = Line {
        scenario: SCENARIO,
        writes: find_return(&record.timeline, event),
        vip: find_return(&vip.timeline(), event),
        redis: find_return(&redis.timeline(), event),
        lost: ha.find_lost(&record).len(),
    };
    report.check(SCENARIO, "writes", line.writes, 10.0);
    report.check(SCENARIO, "VIP", line.vip, 5.0);
    report.check(SCENARIO, "Redis", line.redis, 10.0);
    report.push(line);
    ha.lab.start(&victim).unwrap();
    ha.wait_for("whole after the kill", WHOLE, || ha.is_whole().then_some(()));
}

/// Cut the leader off for a minute: it must not acknowledge what the others do not know.
fn cut_the_leader_off(ha: &Ha, report: &mut Report) {
    const SCENARIO: &str = "leader cut off for 60 s";
    let leader = ha.find_leader().unwrap();
    let (ledger, vip, redis) = (ha.write(), ha.watch_vip(), ha.write_redis());
    ledger.wait_for_write(Duration::from_secs(30)).unwrap();
    std::thread::sleep(Duration::from_secs(2));

    let event = Instant::now();
    ha.lab.partition(&leader).unwrap();
    std::thread::sleep(Duration::from_secs(5));
    let alone = write_alone(ha, &leader);
    std::thread::sleep(Duration::from_secs(60).saturating_sub(event.elapsed()));
    let (writes, back) = (find_return(&ledger.record().timeline, event), vip.timeline());
    let (vip_back, redis_back) = (find_return(&back, event), find_return(&redis.timeline(), event));
    ha.lab.heal(&leader).unwrap();
    ha.wait_for("whole after the cut", WHOLE, || ha.is_whole().then_some(()));
    let record = ledger.stop();
    let servers = record.list_servers();
    assert!(servers.len() <= 2, "more than one primary acknowledged in turn: {servers:?}");
    assert!(!alone, "the leader that was cut off acknowledged a write");
    let line = Line {
        scenario: SCENARIO,
        writes,
        vip: vip_back,
        redis: redis_back,
        lost: ha.find_lost(&record).len(),
    };
    report.check(SCENARIO, "writes", line.writes, 10.0);
    report.push(line);
}

/// Whether a write on the node itself is acknowledged, as a client takes it that does not wait
/// for ever: what is only committed there is told by a warning.
fn write_alone(ha: &Ha, node: &str) -> bool {
    let script = "PGOPTIONS='-c statement_timeout=20s' psql -At -h /run/postgresql \
                  -c 'create table alone (id int)' postgres 2>&1";
    let ran = ha.lab.exec(node, &["su", "postgres", "-s", "/bin/sh", "-c", script], WHOLE).unwrap();
    let said = ran.text();
    eprintln!("a write on the node that is cut off: {}", said.replace('\n', "; "));
    said.contains("CREATE TABLE") && !said.contains("WARNING")
}

fn switch_over(ha: &Ha, report: &mut Report) {
    const SCENARIO: &str = "switchover";
    let ledger = ha.write();
    ledger.wait_for_write(Duration::from_secs(30)).unwrap();
    let sync = ha.wait_for("a synchronous standby", WHOLE, || ha.find_standby());
    let event = Instant::now();
    ha.switch_over(&sync);
    std::thread::sleep(Duration::from_secs(8));
    let (end, record) = (Instant::now(), ledger.stop());
    // The longest time without an acknowledgement, from the last one before it.
    let writes = find_longest_pause(&record.acknowledged, event, end);
    let lost = ha.find_lost(&record).len();
    report.check(SCENARIO, "writes", Some(writes), 3.0);
    report.push(Line { scenario: SCENARIO, writes: Some(writes), vip: None, redis: None, lost });
    ha.wait_for("whole after the switchover", WHOLE, || ha.is_whole().then_some(()));

    let holder = ha.find_vip_holder().unwrap();
    let vip = ha.watch_vip();
    std::thread::sleep(Duration::from_secs(1));
    let event = Instant::now();
    ha.run(&holder, &["systemctl", "stop", "keepalived"]);
    std::thread::sleep(Duration::from_secs(8));
    let back = find_return(&vip.timeline(), event);
    assert_ne!(ha.find_vip_holder(), Some(holder.clone()), "the VIP has not moved");
    report.check("keepalived stopped", "VIP", back, 5.0);
    report.push(Line {
        scenario: "keepalived stopped",
        writes: None,
        vip: back,
        redis: None,
        lost: 0,
    });
    ha.run(&holder, &["systemctl", "start", "keepalived"]);
}

fn refuse_writes_on_a_replica(ha: &Ha) {
    let target = ha.database(REPLICA_PORT);
    let refused = ha.lab.enter_network(|| {
        let ledger = stanchion::lab::ledger::Ledger::start(target).unwrap();
        std::thread::sleep(Duration::from_secs(5));
        ledger.stop()
    });
    let record = refused.unwrap();
    assert!(record.acknowledged.is_empty(), "a replica took writes");
    let why = record.failure.unwrap_or_default();
    assert!(why.contains("read-only"), "{why}");
}

/// A node destroyed with its disk; a fresh one with the same seed takes its place.
fn replace_a_node(ha: &Ha, report: &mut Report) {
    let leader = ha.find_leader().unwrap();
    let victim = ha.others(&leader)[0].to_string();
    let ledger = ha.write();
    ledger.wait_for_write(Duration::from_secs(30)).unwrap();
    ha.lab.kill(&victim).unwrap();
    ha.lab.destroy(&victim).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let began = Instant::now();
    ha.lab.start(&victim).unwrap();
    ha.wait_for("the fresh node is part of all", WHOLE, || ha.is_whole().then_some(()));
    let whole = began.elapsed().as_secs_f64();
    let record = ledger.stop();
    let lost = ha.find_lost(&record).len();
    report.push(Line {
        scenario: "node replaced (until whole)",
        writes: Some(whole),
        vip: None,
        redis: None,
        lost,
    });
}

/// With two of three dead nothing is acknowledged; with one back it goes on by itself.
fn lose_two_of_three(ha: &Ha, report: &mut Report) {
    const SCENARIO: &str = "two of three dead";
    let leader = ha.find_leader().unwrap();
    let dead: Vec<String> = ha.others(&leader).into_iter().map(str::to_string).collect();
    let ledger = ha.write();
    ledger.wait_for_write(Duration::from_secs(30)).unwrap();
    for node in &dead {
        ha.lab.kill(node).unwrap();
    }
    std::thread::sleep(Duration::from_secs(30));
    let before = ledger.record().acknowledged.len();
    std::thread::sleep(Duration::from_secs(5));
    let record = ledger.record();
    assert_eq!(record.acknowledged.len(), before, "a lone node acknowledges writes");
    read_from_survivor(ha, &leader, &record);
    let event = Instant::now();
    ha.lab.start(&dead[0]).unwrap();
    ledger.wait_for_write(WHOLE).unwrap_or_else(|error| {
        ha.show_nodes();
        panic!("{error:#}");
    });
    let writes = event.elapsed().as_secs_f64();
    ha.lab.start(&dead[1]).unwrap();
    ha.wait_for("whole after the loss of two", WHOLE, || ha.is_whole().then_some(()));
    let record = ledger.stop();
    let lost = ha.find_lost(&record).len();
    report.push(Line { scenario: SCENARIO, writes: Some(writes), vip: None, redis: None, lost });
}

/// Whoever asks for any server that lives can read all that was acknowledged; who asks for
/// the leader gets nothing.
fn read_from_survivor(ha: &Ha, survivor: &str, record: &Record) {
    let read = |port| ha.lab.enter_network(|| read_ledger(&ha.database(port))).unwrap();
    let there = ha.wait_for("the survivor can be read", Duration::from_secs(20), || {
        read(ALL_PORT).map_err(|error| eprintln!("{survivor}: {error:#}")).ok()
    });
    assert!(!there.is_empty() && record.find_lost(&there).is_empty(), "the survivor lacks writes");
    assert!(read(LEADER_PORT).is_err(), "{survivor} leads without a majority");
}
