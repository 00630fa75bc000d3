//! Users and groups of the image: the files `passwd(5)`, `group(5)`, `shadow(5)` and
//! `gshadow(5)`.
//!
//! Ids are fixed by the layers, never by the order in which packages happen to be
//! configured: what a node wrote to `/var` must belong to the same users after the image
//! was replaced.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::error::UserError;

/// Ids below this one are the same on every Debian system (base-passwd).
const FIRST_FLOATING: u32 = 100;
const NOBODY: u32 = 65534;
/// base-passwd's one fixed group above the line.
const USERS: u32 = 100;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    pub name: String,
    /// User id, and id of the group of the same name.
    pub id: u32,
    /// `None`: a group only.
    pub user: Option<UserFields>,
    /// Further groups that the user is in.
    pub groups: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserFields {
    pub home: String,
    pub shell: String,
}

/// Add accounts that are not there yet. Without an `/etc/passwd`, Debian's own come first.
pub fn add(root: &Path, accounts: &[Account]) -> Result<()> {
    for (file, master) in [("etc/passwd", "passwd.master"), ("etc/group", "group.master")] {
        let path = root.join(file);
        let master = root.join("usr/share/base-passwd").join(master);
        if !path.exists() && master.exists() {
            fs::copy(&master, &path).with_context(|| format!("making /{file}"))?;
        }
    }
    for account in accounts {
        add_line(root, "etc/group", &account.name, &format!(":x:{}:", account.id))?;
        add_line(root, "etc/gshadow", &account.name, ":!::")?;
        if let Some(UserFields { home, shell }) = &account.user {
            // Where there is no shadow file yet, Debian's scripts move this field there.
            let password = if root.join("etc/shadow").exists() { "x" } else { "!*" };
            let rest = format!(":{password}:{0}:{0}::{home}:{shell}", account.id);
            add_line(root, "etc/passwd", &account.name, &rest)?;
            // Day 0 would mean that the password must be changed at once.
            add_line(root, "etc/shadow", &account.name, ":!*:1::::::")?;
        }
        for group in &account.groups {
            join_group(root, group, &account.name)?;
        }
    }
    Ok(())
}

/// Append `name` + `rest` unless `name` has a line. A file that is not there stays so:
/// Debian's scripts make the shadow files from the others.
fn add_line(root: &Path, file: &str, name: &str, rest: &str) -> Result<()> {
    edit(root, file, |text| {
        let known = text.lines().any(|line| line.split(':').next() == Some(name));
        if known { text } else { format!("{text}{name}{rest}\n") }
    })
}

fn join_group(root: &Path, group: &str, user: &str) -> Result<()> {
    let mut found = false;
    edit(root, "etc/group", |text| {
        let mut join = |line: &str| {
            let mut fields: Vec<&str> = line.split(':').collect();
            if fields.len() != 4 || fields[0] != group {
                return line.to_string();
            }
            found = true;
            let mut members: Vec<&str> = fields[3].split(',').filter(|m| !m.is_empty()).collect();
            if !members.contains(&user) {
                members.push(user);
            }
            let members = members.join(",");
            fields[3] = &members;
            fields.join(":")
        };
        text.lines().map(|line| join(line) + "\n").collect()
    })?;
    if found {
        return Ok(());
    }
    Err(UserError::new(format!("user `{user}` is to be in group `{group}`, which is not there"))
        .help("give the group a `[[group]]` of its own, or drop it from `groups`")
        .into())
}

/// Set every password's day of change to that of `epoch`, so that it tells nothing of the
/// day of the build.
pub fn fix_days(root: &Path, epoch: u64) -> Result<()> {
    let day = (epoch / 86400).to_string();
    edit(root, "etc/shadow", |text| {
        let fix = |line: &str| {
            let mut fields: Vec<&str> = line.split(':').collect();
            if fields.len() > 2 && !fields[2].is_empty() {
                fields[2] = &day;
            }
            fields.join(":") + "\n"
        };
        text.lines().map(fix).collect()
    })
}

/// Refuse accounts whose ids packages chose by themselves.
pub fn check_fixed(root: &Path, declared: &[Account]) -> Result<()> {
    let declared: BTreeMap<&str, u32> =
        declared.iter().map(|account| (account.name.as_str(), account.id)).collect();
    let mut floating = BTreeMap::new();
    for (file, kind) in [("etc/group", "group"), ("etc/passwd", "user")] {
        let Some(text) = read(root, file)? else { continue };
        for line in text.lines() {
            let mut fields = line.split(':');
            let (Some(name), Some(id)) = (fields.next(), fields.nth(1)) else { continue };
            let Ok(id) = id.parse::<u32>() else { continue };
            let fixed = id < FIRST_FLOATING || id == NOBODY || (kind == "group" && id == USERS);
            if !fixed && declared.get(name) != Some(&id) {
                floating.insert(name.to_string(), (kind, id));
            }
        }
    }
    if floating.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = floating
        .iter()
        .map(|(name, (kind, id))| format!("[[{kind}]] name = \"{name}\" id = {id}"))
        .collect();
    Err(UserError::new("packages made accounts whose ids no layer fixes")
        .why("an id that depends on the order of packages would change the owner of data on /var")
        .help(format!("add to the layer that brings the package:\n{}", list.join("\n")))
        .into())
}

/// The ids behind the names `owner` and `group` (or numbers).
pub fn find_ids(root: &Path, owner: &str, group: &str) -> Result<(u32, u32)> {
    let find = |file: &str, name: &str| -> Result<u32> {
        if let Ok(id) = name.parse() {
            return Ok(id);
        }
        let text = read(root, file)?.unwrap_or_default();
        text.lines()
            .find_map(|line| {
                let mut fields = line.split(':');
                (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
            })
            .ok_or_else(|| {
                UserError::new(format!("the image has no `{name}` in /{file}"))
                    .help("give it a `[[user]]` or a `[[group]]` in this layer or one under it")
                    .into()
            })
    };
    Ok((find("etc/passwd", owner)?, find("etc/group", group)?))
}

fn read(root: &Path, file: &str) -> Result<Option<String>> {
    match fs::read_to_string(root.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading /{file}")),
    }
}

/// Rewrite a file in place (its mode and owner stay), when it is there and changes.
fn edit(root: &Path, file: &str, change: impl FnOnce(String) -> String) -> Result<()> {
    let Some(old) = read(root, file)? else { return Ok(()) };
    let new = change(old.clone());
    if new != old {
        fs::write(root.join(file), new).with_context(|| format!("writing /{file}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make_root() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        fs::create_dir_all(dir.path().join("usr/share/base-passwd")).unwrap();
        let master = dir.path().join("usr/share/base-passwd");
        fs::write(master.join("passwd.master"), "root:*:0:0:root:/root:/bin/bash\n").unwrap();
        fs::write(master.join("group.master"), "root:*:0:\nusers:*:100:\n").unwrap();
        dir
    }

    fn account(name: &str, id: u32, groups: &[&str]) -> Account {
        Account {
            name: name.into(),
            id,
            user: Some(UserFields { home: "/".into(), shell: "/usr/sbin/nologin".into() }),
            groups: groups.iter().map(|g| g.to_string()).collect(),
        }
    }

    #[test]
    fn accounts_are_added_once_after_debians_own() {
        let root = make_root();
        let accounts = [account("etcd", 901, &["users"])];
        add(root.path(), &accounts).unwrap();
        add(root.path(), &accounts).unwrap();
        let read = |file: &str| fs::read_to_string(root.path().join(file)).unwrap();
        assert_eq!(
            read("etc/passwd"),
            "root:*:0:0:root:/root:/bin/bash\netcd:!*:901:901::/:/usr/sbin/nologin\n"
        );
        assert_eq!(read("etc/group"), "root:*:0:\nusers:*:100:etcd\netcd:x:901:\n");
        assert!(!root.path().join("etc/shadow").exists());
        assert_eq!(find_ids(root.path(), "etcd", "users").unwrap(), (901, 100));
        check_fixed(root.path(), &accounts).unwrap();
    }

    #[test]
    fn a_floating_id_is_refused_with_the_lines_that_fix_it() {
        let root = make_root();
        add(root.path(), &[account("redis", 105, &[])]).unwrap();
        let error = check_fixed(root.path(), &[account("redis", 900, &[])]).unwrap_err();
        assert!(error.to_string().contains("name = \"redis\" id = 105"), "{error}");
    }

    #[test]
    fn a_group_that_is_not_there_is_named() {
        let root = make_root();
        let error = add(root.path(), &[account("a", 900, &["nope"])]).unwrap_err();
        assert!(error.to_string().contains("`nope`"), "{error}");
    }

    #[test]
    fn the_days_of_passwords_are_those_of_the_epoch() {
        let root = make_root();
        fs::write(root.path().join("etc/shadow"), "root:*:20000:0:99999:7:::\nx:!*:::::::\n")
            .unwrap();
        fix_days(root.path(), 86400 * 7).unwrap();
        let shadow = fs::read_to_string(root.path().join("etc/shadow")).unwrap();
        assert_eq!(shadow, "root:*:7:0:99999:7:::\nx:!*:::::::\n");
    }
}
