//! Early failover's guards: faults that are no death of the leader, and deaths that leave
//! Patroni to its own way. Nothing acknowledged is lost, whatever the fault.

#[allow(dead_code, reason = "other tests do more with a cluster")]
#[path = "support/ha.rs"]
mod ha;
#[allow(dead_code, reason = "other tests look into the image")]
#[path = "support/image.rs"]
mod image;

use std::time::{Duration, Instant};

use ha::report::{Line, Report, find_longest_pause, find_return};
use ha::{Ha, WHOLE};
use stanchion::lab::ledger::{Ledger, Record};

/// Writes may stop for so long where nothing is to be noticed: a busy machine, no failover.
const UNNOTICED: f64 = 3.0;

/// One fault at a time on one cluster, whole before each. Most of the time is spent waiting
/// longer than a lease lasts, so that the faults are spread over two clusters at once.
#[test]
fn faults_of_single_programs_are_no_death_of_the_leader() {
    let Some(ha) = start("programs", |_| {}) else { return };
    let mut report = Report::default();
    kill_the_agent(&ha, &mut report);
    kill_the_postmaster(&ha, &mut report);
    kill_the_standby(&ha, &mut report);
    freeze_the_leader(&ha, &mut report);
    kill_without_the_standbys_agent(&ha, &mut report);
    pause(&ha);
    report.finish();
}

/// Likewise.
#[test]
fn faults_of_the_network_lose_nothing() {
    let Some(ha) = start("network", |_| {}) else { return };
    let mut report = Report::default();
    cut_from_etcd(&ha, &mut report);
    cut_from_peers(&ha, &mut report);
    lose_one_way(&ha, &mut report, "input", "leader hears nobody");
    lose_one_way(&ha, &mut report, "output", "nobody hears the leader");
    report.finish();
}

/// The node that is all at once, etcd's leader among it, killed several times; and once
/// with early failover turned off.
#[test]
fn early_failover_is_faster_than_the_lease() {
    let mut report = Report::default();
    let mut early = Vec::new();
    {
        let Some(ha) = start("early", |_| {}) else { return };
        for _ in 0..3 {
            early.extend(kill_everything(&ha, &mut report, "kill, early failover", 10.0));
        }
    }
    let Some(ha) = start("late", |cluster| cluster.tuning.early_failover = false) else { return };
    let late = kill_everything(&ha, &mut report, "kill, the lease runs out", 30.0);
    early.sort_by(f64::total_cmp);
    eprintln!("writes back after a kill: early {early:.1?} s, else {late:.1?} s");
    if let (Some(slowest), Some(late)) = (early.last(), late) {
        assert!(*slowest < late, "early failover gains nothing");
        assert!(late > 15.0, "without early failover the lease has to run out");
    }
    report.finish();
}

fn start(name: &str, edit: impl FnOnce(&mut stanchion::config::cluster::Cluster)) -> Option<Ha> {
    let ha = Ha::create(name, edit)?;
    ha.form();
    Some(ha)
}

/// Clients at work, and what was so before the fault.
struct Watched<'h> {
    ha: &'h Ha,
    ledger: Ledger,
    leader: String,
    failovers: usize,
    event: Instant,
}

impl<'h> Watched<'h> {
    /// The cluster is whole, and written to; from now on the fault counts.
    fn begin(ha: &'h Ha) -> Self {
        ha.wait_for("whole before the fault", WHOLE, || ha.is_whole().then_some(()));
        let leader = ha.find_leader().unwrap();
        let failovers = ha.count_early_failovers();
        let ledger = ha.write();
        ledger.wait_for_write(Duration::from_secs(30)).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        Watched { ha, ledger, leader, failovers, event: Instant::now() }
    }

    /// Writes went on, or came back, as one leader's.
    fn expect_same_leader(self, report: &mut Report, scenario: &'static str, bound: f64) {
        let (ha, leader) = (self.ha, self.leader.clone());
        ha.wait_for("whole after the fault", WHOLE, || ha.is_whole().then_some(()));
        let failovers = self.failovers;
        assert_eq!(ha.find_leader(), Some(leader), "{scenario}: the leader has changed");
        assert_eq!(ha.count_early_failovers(), failovers, "{scenario}: a lease was ended early");
        let pause = self.finish(report, scenario, 1, None);
        report.check(scenario, "longest pause of writes", Some(pause), bound);
    }

    /// Another node leads, and the old leader follows it.
    fn expect_other_leader(
        self,
        report: &mut Report,
        scenario: &'static str,
        back: Option<f64>,
        bound: f64,
    ) {
        let (ha, leader) = (self.ha, self.leader.clone());
        ha.wait_for("whole after the fault", WHOLE, || ha.is_whole().then_some(()));
        assert_ne!(ha.find_leader(), Some(leader), "{scenario}: nobody has taken over");
        self.finish(report, scenario, 2, Some(back));
        report.check(scenario, "writes", back, bound);
    }

    fn finish(
        self,
        report: &mut Report,
        scenario: &'static str,
        most: usize,
        back: Option<Option<f64>>,
    ) -> f64 {
        let end = Instant::now();
        let record: Record = self.ledger.stop();
        let servers = record.list_servers();
        assert!(servers.len() <= most, "{scenario}: these acknowledged in turn: {servers:?}");
        let pause = find_longest_pause(&record.acknowledged, self.event, end);
        let writes = back.unwrap_or(Some(pause));
        let lost = self.ha.find_lost(&record).len();
        report.push(Line { scenario, writes, vip: None, redis: None, lost });
        pause
    }
}

/// PostgreSQL lives and serves: nobody may take over because its agent is gone.
fn kill_the_agent(ha: &Ha, report: &mut Report) {
    let watched = Watched::begin(ha);
    let leader = watched.leader.clone();
    ha.run(&leader, &["systemctl", "mask", "--runtime", "--quiet", "stanchion-agent"]);
    ha.run(&leader, &["systemctl", "kill", "--signal=KILL", "stanchion-agent"]);
    std::thread::sleep(Duration::from_secs(30));
    assert!(ha.get_status(&leader).is_none(), "the agent lives");
    ha.run(&leader, &["systemctl", "unmask", "--runtime", "--quiet", "stanchion-agent"]);
    ha.run(&leader, &["systemctl", "start", "stanchion-agent"]);
    watched.expect_same_leader(report, "agent dead for 30 s, PostgreSQL lives", UNNOTICED);
}

/// Patroni starts it again where it was.
fn kill_the_postmaster(ha: &Ha, report: &mut Report) {
    let watched = Watched::begin(ha);
    let script = "kill -KILL $(head -1 /var/lib/postgresql/17/main/postmaster.pid)";
    ha.run(&watched.leader, &["sh", "-c", script]);
    std::thread::sleep(Duration::from_secs(15));
    watched.expect_same_leader(report, "postmaster killed", 10.0);
}

/// Writes wait until the leader has noticed, and has taken the other replica.
fn kill_the_standby(ha: &Ha, report: &mut Report) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    ha.move_vip(&leader);
    let watched = Watched::begin(ha);
    let standby = ha.wait_for("a synchronous standby", WHOLE, || ha.find_standby());
    ha.lab.kill(&standby).unwrap();
    std::thread::sleep(Duration::from_secs(25));
    ha.lab.start(&standby).unwrap();
    watched.expect_same_leader(report, "synchronous standby killed", 12.0);
}

/// Longer than the lease: Patroni's failsafe mode keeps a leader whom all members know.
fn cut_from_etcd(ha: &Ha, report: &mut Report) {
    let watched = Watched::begin(ha);
    let leader = watched.leader.clone();
    let rules = ["input", "output"]
        .into_iter()
        .flat_map(|hook| {
            ["sport", "dport"].map(|end| (hook, format!("tcp {end} {{ 2379, 2380 }}")))
        })
        .collect::<Vec<_>>();
    ha.cut(&leader, &rules);
    std::thread::sleep(Duration::from_secs(40));
    ha.mend(&leader);
    watched.expect_same_leader(report, "leader cut off from etcd for 40 s", UNNOTICED);
}

/// Its agent has a pulse: it keeps its lease, drops the standby that it cannot reach, and
/// goes on alone where clients reach it.
fn cut_from_peers(ha: &Ha, report: &mut Report) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    ha.move_vip(&leader);
    let watched = Watched::begin(ha);
    let others = ha.name_others(&leader);
    let mut rules = Vec::new();
    for end in ["sport", "dport"] {
        let ports = format!("tcp {end} {{ 5432, 7443, 8008 }}");
        rules.push(("input", format!("ip saddr {others} {ports}")));
        rules.push(("output", format!("ip daddr {others} {ports}")));
    }
    ha.cut(&leader, &rules);
    std::thread::sleep(Duration::from_secs(40));
    ha.mend(&leader);
    watched.expect_same_leader(report, "leader cut off from its peers for 40 s", 15.0);
}

/// An answer needs both ways: as a leader that is cut off. The VIP is elsewhere.
fn lose_one_way(ha: &Ha, report: &mut Report, hook: &'static str, scenario: &'static str) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let other = ha.others(&leader)[0].to_string();
    ha.move_vip(&other);
    let watched = Watched::begin(ha);
    let end = if hook == "input" { "saddr" } else { "daddr" };
    ha.cut(&leader, &[(hook, format!("ip {end} {}", ha.name_others(&leader)))]);
    std::thread::sleep(Duration::from_secs(40));
    let back = find_return(&watched.ledger.record().timeline, watched.event);
    ha.mend(&leader);
    watched.expect_other_leader(report, scenario, back, 15.0);
}

/// Frozen for longer than its lease. Thawed, it must not take up what others do by now.
fn freeze_the_leader(ha: &Ha, report: &mut Report) {
    const SCENARIO: &str = "leader frozen for 30 s, and thawed";
    let frozen = ha.gather_everything();
    let watched = Watched::begin(ha);
    assert_eq!(watched.leader, frozen);
    ha.lab.freeze(&frozen).unwrap();
    std::thread::sleep(Duration::from_secs(30));
    let back = find_return(&watched.ledger.record().timeline, watched.event);
    ha.lab.thaw(&frozen).unwrap();
    let thawed = Instant::now();
    ha.wait_for("whole after the thaw", WHOLE, || ha.is_whole().then_some(()));
    report.check(SCENARIO, "whole", Some(thawed.elapsed().as_secs_f64()), 60.0);
    eprintln!("whole {:.1} s after the thaw", thawed.elapsed().as_secs_f64());
    watched.expect_other_leader(report, SCENARIO, back, 15.0);
}

/// One agent alone is no majority: the lease has to run out.
fn kill_without_the_standbys_agent(ha: &Ha, report: &mut Report) {
    const SCENARIO: &str = "leader killed, agent of the standby stopped";
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let standby = ha.wait_for("a synchronous standby", WHOLE, || ha.find_standby());
    ha.move_vip(&standby);
    let watched = Watched::begin(ha);
    ha.run(&standby, &["systemctl", "stop", "stanchion-agent"]);
    let watched = Watched { event: Instant::now(), ..watched };
    ha.lab.kill(&leader).unwrap();
    std::thread::sleep(Duration::from_secs(45));
    let back = find_return(&watched.ledger.record().timeline, watched.event);
    ha.run(&standby, &["systemctl", "start", "stanchion-agent"]);
    ha.lab.start(&leader).unwrap();
    watched.expect_other_leader(report, SCENARIO, back, 30.0);
}

/// A pause is told by every node, with how long it has lasted, and forgotten when it is over.
fn pause(ha: &Ha) {
    let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
    let tell = |verb| ha.run(&leader, &["patronictl", "-c", "/etc/patroni/config.yml", verb]);
    let is_told = |page: &serde_json::Value| {
        let reasons = page["reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
        reasons.iter().any(|reason| {
            reason.as_str().unwrap_or("").starts_with("Patroni has been paused for 0 min")
        })
    };
    tell("pause");
    ha.wait_for("all tell the pause", WHOLE, || {
        let pages: Vec<_> = ha.nodes().into_iter().filter_map(|n| ha.get_status(n)).collect();
        (pages.len() == 3 && pages.iter().all(is_told)).then_some(())
    });
    tell("resume");
    ha.wait_for("whole after the pause", WHOLE, || ha.is_whole().then_some(()));
}

/// Seconds until writes are back.
fn kill_everything(
    ha: &Ha,
    report: &mut Report,
    scenario: &'static str,
    bound: f64,
) -> Option<f64> {
    let victim = ha.gather_everything();
    ha.move_etcd(&victim);
    let (vip, redis) = (ha.watch_vip(), ha.write_redis());
    let watched = Watched::begin(ha);
    ha.lab.kill(&victim).unwrap();
    std::thread::sleep(Duration::from_secs_f64(bound + 5.0));
    let back = find_return(&watched.ledger.record().timeline, watched.event);
    let vip = find_return(&vip.timeline(), watched.event);
    let redis = find_return(&redis.timeline(), watched.event);
    eprintln!("{scenario}: VIP {vip:.1?} s, Redis {redis:.1?} s");
    report.check(scenario, "VIP", vip, 5.0);
    report.check(scenario, "Redis", redis, 10.0);
    ha.show_failover(&victim);
    ha.lab.start(&victim).unwrap();
    watched.expect_other_leader(report, scenario, back, bound);
    back
}
