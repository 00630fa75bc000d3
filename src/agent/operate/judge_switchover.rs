//! Whether a switchover may be: a pure function of Patroni's view of its cluster.

use super::super::patroni::View;
use crate::error::{UserError, find_nearest};

/// From whom to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    pub from: String,
    pub to: String,
}

/// Choose who takes over: the synchronous standby, which is the only one that has every
/// write that was acknowledged. `to` is who the operator wants.
///
/// # Errors
/// A [`UserError`] with the reason when nobody may.
pub fn judge_switchover(view: &View, to: Option<&str>) -> Result<Switch, UserError> {
    let refuse = |why: String| UserError::new("there can be no switchover now").why(why);
    if view.pause {
        return Err(refuse("Patroni is paused".into())
            .help("end the maintenance first: `patronictl resume`"));
    }
    let Some(leader) =
        view.members.iter().find(|member| member.role == "leader" && member.state == "running")
    else {
        return Err(refuse("PostgreSQL has no leader that runs".into())
            .help("see `stanchion status`; nobody has to hand over, one has to be elected"));
    };
    let standby = view
        .members
        .iter()
        .find(|member| member.role == "sync_standby" && member.state == "streaming");
    let Some(to) = to else {
        let standby = standby.ok_or_else(|| {
            refuse("there is no synchronous standby that follows the leader".into())
                .help("wait until `stanchion status` shows one; others may lack the last writes")
        })?;
        return Ok(Switch { from: leader.name.clone(), to: standby.name.clone() });
    };
    let Some(wanted) = view.members.iter().find(|member| member.name == to) else {
        let error = refuse(format!("no member of PostgreSQL's cluster is called `{to}`"));
        let names = || view.members.iter().map(|member| member.name.as_str());
        return Err(match find_nearest(to, names()) {
            Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
            None => error.help(format!("there are: {}", names().collect::<Vec<_>>().join(", "))),
        });
    };
    if wanted.name == leader.name {
        return Err(refuse(format!("{to} is the leader already")));
    }
    match standby {
        Some(standby) if standby.name == to => {
            Ok(Switch { from: leader.name.clone(), to: to.to_string() })
        }
        Some(standby) => Err(refuse(format!(
            "{to} is {} {}, and may lack the last writes that were acknowledged",
            wanted.role, wanted.state
        ))
        .help(format!("the synchronous standby is {}: leave --to away, or name it", standby.name))),
        None => Err(refuse(format!(
            "{to} is {} {}, and there is no synchronous standby",
            wanted.role, wanted.state
        ))
        .help("wait until `stanchion status` shows one")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn view(members: &[(&str, &str, &str)], pause: bool) -> View {
        let members: Vec<_> = members
            .iter()
            .map(|(name, role, state)| json!({"name": name, "role": role, "state": state}))
            .collect();
        serde_json::from_value(json!({"members": members, "pause": pause})).unwrap()
    }

    const WHOLE: [(&str, &str, &str); 3] = [
        ("n1", "leader", "running"),
        ("n2", "sync_standby", "streaming"),
        ("n3", "replica", "streaming"),
    ];

    #[test]
    fn the_synchronous_standby_takes_over() {
        let switch = Switch { from: "n1".into(), to: "n2".into() };
        assert_eq!(judge_switchover(&view(&WHOLE, false), None), Ok(switch.clone()));
        assert_eq!(judge_switchover(&view(&WHOLE, false), Some("n2")), Ok(switch));
    }

    #[test]
    fn whoever_may_lack_writes_does_not() {
        let refused = |members: &[(&str, &str, &str)], pause, to| {
            judge_switchover(&view(members, pause), to).unwrap_err().to_string()
        };
        assert!(refused(&WHOLE, true, None).contains("paused"));
        assert!(refused(&WHOLE, false, Some("n3")).contains("synchronous standby is n2"));
        assert!(refused(&WHOLE, false, Some("n1")).contains("leader already"));
        assert!(refused(&WHOLE, false, Some("n22")).contains("did you mean `n2`"));
        assert!(refused(&WHOLE[..1], false, None).contains("no synchronous standby"));
        assert!(refused(&WHOLE[1..], false, None).contains("no leader"));
        let mut starting = WHOLE;
        starting[1].2 = "starting";
        assert!(refused(&starting, false, None).contains("no synchronous standby"));
        assert!(refused(&starting, false, Some("n2")).contains("sync_standby starting"));
        assert!(refused(&[], false, None).contains("no leader"));
    }
}
