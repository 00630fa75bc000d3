//! The power of all nodes goes at once, and comes back in some order.

use std::time::{Duration, Instant};

use crate::ha::report::{Line, Report};
use crate::ha::{Ha, WHOLE};

/// Seconds from the start of the node with which there is a majority.
const BOUND: f64 = 20.0;
/// Where the leader of before is not there, its lease has to end, early or by itself; where its
/// standby is not, it has to choose another.
const BOUND_OF_TWO: f64 = 30.0;

/// Each time all are killed at once. Nobody says to a node what the others will do: one that
/// comes first must neither give up nor begin anew.
pub fn lose_power_and_start_in_any_order(ha: &Ha, report: &mut Report) {
    type Order = fn(&str, &[&str; 2]) -> Vec<(String, u64)>;
    // The nodes in order, each with the seconds until the next.
    let orders: [(&str, f64, Order); 4] = [
        ("power-off of all, one a second", BOUND, |leader, [a, b]| {
            [(*b, 1), (*a, 1), (leader, 0)].map(own).to_vec()
        }),
        ("power-off of all, old leader alone for 12 s", BOUND, |leader, [a, b]| {
            [(leader, 12), (*a, 1), (*b, 0)].map(own).to_vec()
        }),
        ("power-off of all, old leader comes last", BOUND_OF_TWO, |leader, [a, b]| {
            [(*a, 0), (*b, AFTER_WRITES), (leader, 0)].map(own).to_vec()
        }),
        ("power-off of all, one by one", BOUND_OF_TWO, |leader, [a, b]| {
            [(*b, 8), (leader, 8), (*a, 0)].map(own).to_vec()
        }),
    ];
    for (scenario, bound, order) in orders {
        let leader = ha.wait_for("a leader", WHOLE, || ha.find_leader());
        let [a, b] = ha.others(&leader)[..] else { panic!("not three nodes") };
        let (writes, lost) = lose_power(ha, scenario, &order(&leader, &[a, b]));
        report.check(scenario, "writes", writes, bound);
        report.push(Line { scenario, writes, vip: None, redis: None, lost });
    }
}

/// In the place of seconds: until writes are back.
const AFTER_WRITES: u64 = u64::MAX;

fn own((node, pause): (&str, u64)) -> (String, u64) {
    (node.to_string(), pause)
}

/// Seconds until writes were back, and how many acknowledged ones are gone.
fn lose_power(ha: &Ha, scenario: &str, order: &[(String, u64)]) -> (Option<f64>, usize) {
    let ledger = ha.write();
    ledger.wait_for_write(Duration::from_secs(30)).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    for node in ha.nodes() {
        ha.lab.kill(node).unwrap();
    }
    let before = ledger.record().acknowledged.len();
    let wait_for_writes = || {
        ledger.wait_for_write(WHOLE).unwrap_or_else(|error| {
            ha.show_nodes();
            panic!("{scenario}: {error:#}");
        });
    };
    let mut majority = None;
    for (place, (node, pause)) in order.iter().enumerate() {
        if place == 1 {
            assert_eq!(ledger.record().acknowledged.len(), before, "{scenario}: by one node alone");
            majority = Some(Instant::now());
        }
        ha.lab.start(node).unwrap();
        match *pause {
            AFTER_WRITES => wait_for_writes(),
            seconds => std::thread::sleep(Duration::from_secs(seconds)),
        }
    }
    wait_for_writes();
    let writes = ledger.record().timeline.find_return(majority.unwrap(), Instant::now());
    ha.wait_for("whole after the power-off", WHOLE, || ha.is_whole().then_some(()));
    (writes.map(|back| back.as_secs_f64()), ha.find_lost(&ledger.stop()).len())
}
