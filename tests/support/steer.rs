//! Putting roles on nodes of the test's choice, and cutting single links of a node.

use std::time::Duration;

use super::{Ha, WHOLE};

/// The table in a node that holds the rules of [`Ha::cut`].
const TABLE: &str = "stanchion_test";

impl Ha {
    /// Move the lead, the VIP and the Redis master to one node.
    pub fn gather_everything(&self) -> String {
        let victim = self.wait_for("a Redis master", WHOLE, || self.find_redis_master());
        if self.find_leader().as_ref() != Some(&victim) {
            self.switch_to(&victim);
        }
        self.move_vip(&victim);
        victim
    }

    pub fn move_vip(&self, target: &str) {
        let others = self.others(target);
        for other in &others {
            self.run(other, &["systemctl", "stop", "keepalived"]);
        }
        let holds = || (self.find_vip_holder()? == target).then_some(());
        self.wait_for("the VIP has moved", Duration::from_secs(20), holds);
        for other in &others {
            self.run(other, &["systemctl", "start", "keepalived"]);
        }
        self.wait_for("whole with the VIP moved", WHOLE, || self.is_whole().then_some(()));
    }

    /// Let etcd be led from this node, too.
    pub fn move_etcd(&self, target: &str) {
        // There is no etcdctl in an image; Patroni brings Python.
        const SCRIPT: &str = "\
import json, ssl, sys, urllib.request
tls = ssl.create_default_context(cafile='/run/stanchion/tls/ca.pem')
tls.load_cert_chain('/run/stanchion/tls/node.pem', '/run/stanchion/tls/node.key')
def ask(path, body):
    url = 'https://127.0.0.1:2379/v3/' + path
    data = json.dumps(body).encode()
    return json.load(urllib.request.urlopen(urllib.request.Request(url, data), context=tls))
members = ask('cluster/member/list', {})['members']
target = [member['ID'] for member in members if member['name'] == sys.argv[1]][0]
ask('maintenance/transfer-leadership', {'targetID': target})
";
        let is_led = |name: &str| {
            let nodes = self.list_registered();
            nodes.iter().any(|node| node["name"] == name && node["etcd"] == "leader")
        };
        let leads = || self.nodes().into_iter().find(|name| is_led(name)).map(str::to_string);
        let leader = self.wait_for("etcd has a leader", WHOLE, leads);
        if leader == target {
            return;
        }
        self.run(&leader, &["python3", "-I", "-c", SCRIPT, target]);
        self.wait_for("etcd's lead has moved", WHOLE, || is_led(target).then_some(()));
    }

    /// Write a key of etcd, or delete it.
    pub fn change_etcd(&self, node: &str, key: &str, value: Option<&str>) {
        const SCRIPT: &str = "\
import base64, json, ssl, sys, urllib.request
tls = ssl.create_default_context(cafile='/run/stanchion/tls/ca.pem')
tls.load_cert_chain('/run/stanchion/tls/node.pem', '/run/stanchion/tls/node.key')
encode = lambda text: base64.b64encode(text.encode()).decode()
body = {'key': encode(sys.argv[1])}
path = 'deleterange'
if len(sys.argv) > 2:
    body['value'], path = encode(sys.argv[2]), 'put'
url = 'https://127.0.0.1:2379/v3/kv/' + path
urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), context=tls)
";
        let mut argv = vec!["python3", "-I", "-c", SCRIPT, key];
        argv.extend(value);
        self.run(node, &argv);
    }

    /// Make a node the leader. Only the synchronous standby can take over: when the candidate
    /// is not, restarting the standby makes it so.
    pub fn switch_to(&self, candidate: &str) {
        for _ in 0..4 {
            if self.find_standby().as_deref() == Some(candidate) {
                break;
            }
            let standby = self.wait_for("a synchronous standby", WHOLE, || self.find_standby());
            self.run(&standby, &["systemctl", "restart", "patroni"]);
            std::thread::sleep(Duration::from_secs(5));
            self.wait_for("whole after a restart", WHOLE, || self.is_whole().then_some(()));
        }
        self.switch_over(candidate);
        let leads = || (self.find_leader()? == candidate).then_some(());
        self.wait_for("the candidate leads", Duration::from_secs(30), leads);
    }

    pub fn switch_over(&self, candidate: &str) {
        let leader = self.find_leader().unwrap();
        let config = "/etc/patroni/config.yml";
        self.run(
            &leader,
            &["patronictl", "-c", config, "switchover", "--candidate", candidate, "--force"],
        );
    }

    /// Drop what these rules match, in a node: lines of `input` or `output` and a match.
    pub fn cut(&self, node: &str, rules: &[(&str, String)]) {
        let mut script = format!("add table inet {TABLE}\n");
        for hook in ["input", "output"] {
            script += &format!(
                "add chain inet {TABLE} {hook} {{ type filter hook {hook} priority -150; }}\n"
            );
        }
        for (hook, matched) in rules {
            script += &format!("add rule inet {TABLE} {hook} {matched} drop\n");
        }
        self.run(node, &["nft", &script]);
    }

    pub fn mend(&self, node: &str) {
        self.run(node, &["nft", "delete", "table", "inet", TABLE]);
    }

    /// Addresses of the other nodes, as a set of nftables.
    pub fn name_others(&self, node: &str) -> String {
        let address = |other: &str| self.lab.address(other).unwrap().to_string();
        let others: Vec<String> = self.others(node).into_iter().map(address).collect();
        format!("{{ {} }}", others.join(", "))
    }

    /// How often any agent has ended a lease early, since the nodes have started.
    pub fn count_early_failovers(&self) -> usize {
        let count = |node: &str| {
            let argv = ["journalctl", "-b", "-u", "stanchion-agent", "-o", "cat", "--no-pager"];
            let text = self.run(node, &argv);
            text.lines().filter(|line| line.contains("its lease was ended early")).count()
        };
        self.nodes().into_iter().map(count).sum()
    }

    /// What the others' agents and Patroni said of the last seconds, with the time of each
    /// line, for whoever looks where a failover's seconds went.
    pub fn show_failover(&self, victim: &str) {
        const WORDS: &str = "early failover|promot|Lock owner|leader lease|raft.node: .* (lost|elected)|healthiest|acquired|failsafe";
        for node in self.others(victim) {
            let units = "-u stanchion-agent -u patroni -u etcd";
            let script = format!(
                "journalctl -b --since=-60s {units} -o short-precise --no-pager | grep -E '{WORDS}' \
                 | cut -c 8-220 | tail -40"
            );
            let said = self.lab.exec(node, &["sh", "-c", &script], Duration::from_secs(10));
            eprintln!("{node}:\n{}", said.map(|ran| ran.text()).unwrap_or_default());
        }
    }
}
