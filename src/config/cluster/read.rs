//! From the cluster file to the cluster: texts become values, profiles give the roles,
//! and then the rules are asked.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result};

use super::raw::{RawCluster, RawExternal, RawTuning};
use super::rules::{Fault, Place, check_rules};
use super::{
    Backup, CertificateFiles, Cluster, External, ExternalPostgres, ExternalRedis, Node,
    ObjectStorage, Role, Tuning,
};
use crate::config::Project;
use crate::config::raw::Text;
use crate::config::source::{Source, quote};
use crate::error::{UserError, find_nearest};

/// Bytes that the certificates of a CA may have: they go with every seed.
const MAX_CA: u64 = 16 << 10;

/// Read and check a cluster file; the nodes' roles are those of the project's profiles.
///
/// # Errors
/// A [`UserError`] for each mistake in the file, with its line, and in the profiles.
pub fn load_cluster(path: &Path, project: &Project) -> Result<Cluster> {
    if !path.exists() {
        let shown = quote(&path.to_string_lossy());
        return Err(UserError::new(format!("there is no cluster file {shown}"))
            .help("write one with `stanchion cluster new`, or name yours")
            .into());
    }
    if !path.is_file() {
        let shown = quote(&path.to_string_lossy());
        return Err(UserError::new(format!("{shown} is no file")).into());
    }
    let source = Source::read(Path::new(""), path, "a cluster file")?;
    let raw: RawCluster = source.parse()?;
    let spans = list_spans(&raw);
    let cluster = read_values(&source, raw, project)?;
    check_rules(&cluster).map_err(|fault| explain_fault(&source, &spans, fault))?;
    Ok(cluster)
}

/// The certificate that a cluster file brings for users: where its files are.
///
/// # Errors
/// A [`UserError`] as of [`load_cluster`], of what does not hang on the project.
pub fn find_certificate(path: &Path) -> Result<Option<CertificateFiles>> {
    let source = Source::read(Path::new(""), path, "a cluster file")?;
    let raw: RawCluster = source.parse()?;
    Ok(raw.certificate.map(|raw| CertificateFiles {
        chain: path.with_file_name(raw.chain.get_ref()),
        key: path.with_file_name(raw.key.get_ref()),
        file: path.to_path_buf(),
        line: source.line(raw.chain.span().start),
    }))
}

fn read_values(source: &Source, raw: RawCluster, project: &Project) -> Result<Cluster> {
    let mut roles: BTreeMap<String, Vec<Role>> = BTreeMap::new();
    for node in &raw.node {
        let profile = node.profile.get_ref();
        if !roles.contains_key(profile) {
            roles.insert(profile.clone(), read_roles(source, &node.profile, project)?);
        }
    }
    let nodes = raw.node.into_iter().map(|node| {
        let profile = node.profile.into_inner();
        Ok(Node {
            address: read_address(source, "node.address", &node.address)?,
            name: node.name.into_inner(),
            zone: node.zone.into_inner(),
            roles: roles.get(&profile).cloned().unwrap_or_default(),
            profile,
        })
    });
    let nodes = nodes.collect::<Result<_>>()?;
    let optional = |key: &str, text: &Option<Text>| {
        text.as_ref().map(|text| read_address(source, key, text)).transpose()
    };
    Ok(Cluster {
        vip: optional("vip", &raw.vip)?,
        network: raw.network.get_ref().parse().map_err(|help: String| {
            let what = format!("bad network {}", quote(raw.network.get_ref()));
            source.error(raw.network.span(), what).help(help)
        })?,
        gateway: optional("gateway", &raw.gateway)?,
        dns: raw.dns.iter().map(|text| read_address(source, "dns", text)).collect::<Result<_>>()?,
        name: raw.name.into_inner(),
        domain: raw.domain.into_inner(),
        ntp: raw.ntp.into_iter().map(Text::into_inner).collect(),
        nodes,
        storage: raw.storage.map(|storage| ObjectStorage {
            endpoint: storage.endpoint.into_inner(),
            bucket: storage.bucket.into_inner(),
            region: storage.region.into_inner(),
        }),
        backup: raw.backup.map(|backup| {
            let backup = backup.into_inner();
            Backup {
                directory: backup.directory.map(Text::into_inner),
                keep: backup.keep.map_or(Backup::KEEP, toml::Spanned::into_inner),
            }
        }),
        external: read_external(source, &raw.external)?,
        tuning: read_tuning(source, &raw.tuning)?,
    })
}

fn read_roles(source: &Source, profile: &Text, project: &Project) -> Result<Vec<Role>> {
    let name = profile.get_ref();
    let known = project.list_profiles()?;
    if known.contains(name) {
        let loaded = project.load_profile(name).with_context(|| {
            let line = source.line(profile.span().start);
            format!("reading the profile that {}:{line} names", source.path().display())
        })?;
        return Ok(loaded.roles());
    }
    let what = format!("there is no profile {}", quote(name));
    let error = source.error(profile.span(), what);
    let error = match known.as_slice() {
        [] => error.why("the project has none"),
        known => error.why(format!("the project has: {}", known.join(", "))),
    };
    Err(match find_nearest(name, known.iter().map(String::as_str)) {
        Some(nearest) => error.help(format!("did you mean `{nearest}`?")),
        None => error,
    }
    .into())
}

fn read_address<A: FromStr>(source: &Source, key: &str, text: &Text) -> Result<A> {
    text.get_ref().parse().map_err(|_| {
        let what = format!("bad address {} in `{key}`", quote(text.get_ref()));
        let help = if key == "dns" { "10.0.0.53 or fd00::53" } else { "10.0.0.11" };
        source.error(text.span(), what).help(format!("write it like {help}")).into()
    })
}

/// The certificates of CAs go with the seeds, so what is in the files counts.
fn read_external(source: &Source, raw: &RawExternal) -> Result<External> {
    let read_port = |key: &str, port: &Option<toml::Spanned<u32>>, usual: u16| match port {
        None => Ok(usual),
        Some(port) => {
            let number = u16::try_from(*port.get_ref()).ok().filter(|number| *number > 0);
            number.ok_or_else(|| {
                let what = format!("bad `{key}` `{}`", port.get_ref());
                source.error(port.span(), what).help("take one from 1 to 65535")
            })
        }
    };
    let read_ca = |text: &Text| -> Result<String> {
        let path = source.path().with_file_name(text.get_ref());
        let read = crate::config::source::read_small(&path, MAX_CA);
        read.map_err(|why| {
            let what = format!("the CA {} cannot be read", quote(text.get_ref()));
            source.error(text.span(), what).why(why).into()
        })
    };
    let word = |text: &Option<Text>| {
        text.as_ref().map_or_else(|| "netbox".to_string(), |text| text.get_ref().clone())
    };
    let postgres = raw.postgres.as_ref().map(|raw| {
        Ok::<_, anyhow::Error>(ExternalPostgres {
            host: raw.host.get_ref().clone(),
            port: read_port("external.postgres.port", &raw.port, 5432)?,
            database: word(&raw.database),
            user: word(&raw.user),
            ca: read_ca(&raw.ca)?,
        })
    });
    let redis = raw.redis.as_ref().map(|raw| {
        Ok::<_, anyhow::Error>(ExternalRedis {
            host: raw.host.get_ref().clone(),
            port: read_port("external.redis.port", &raw.port, 6379)?,
            ca: read_ca(&raw.ca)?,
        })
    });
    Ok(External { postgres: postgres.transpose()?, redis: redis.transpose()? })
}

fn read_tuning(source: &Source, raw: &RawTuning) -> Result<Tuning> {
    let usual = Tuning::default();
    let take = |given: &Option<toml::Spanned<u32>>, usual: u32| {
        given.as_ref().map_or(usual, |number| *number.get_ref())
    };
    let vrrp_router_id = match &raw.vrrp_router_id {
        None => usual.vrrp_router_id,
        Some(number) => u8::try_from(*number.get_ref()).map_err(|_| {
            let what = format!("bad `tuning.vrrp_router_id` `{}`", number.get_ref());
            source.error(number.span(), what).help("take one from 1 to 255")
        })?,
    };
    Ok(Tuning {
        early_failover: raw.early_failover.unwrap_or(usual.early_failover),
        patroni_ttl: take(&raw.patroni_ttl, usual.patroni_ttl),
        patroni_loop_wait: take(&raw.patroni_loop_wait, usual.patroni_loop_wait),
        patroni_retry_timeout: take(&raw.patroni_retry_timeout, usual.patroni_retry_timeout),
        vrrp_router_id,
    })
}

/// Where each value stands that a rule can name.
fn list_spans(raw: &RawCluster) -> BTreeMap<Place, Range<usize>> {
    let mut spans = BTreeMap::new();
    let mut put = |key, index, span| {
        spans.insert(Place { key, index }, span);
    };
    for (key, text) in [
        ("name", Some(&raw.name)),
        ("domain", Some(&raw.domain)),
        ("vip", raw.vip.as_ref()),
        ("network", Some(&raw.network)),
        ("gateway", raw.gateway.as_ref()),
    ] {
        text.into_iter().for_each(|text| put(key, 0, text.span()));
    }
    for (key, texts) in [("dns", &raw.dns), ("ntp", &raw.ntp)] {
        texts.iter().enumerate().for_each(|(i, text)| put(key, i, text.span()));
    }
    for (i, node) in raw.node.iter().enumerate() {
        put("node.name", i, node.name.span());
        put("node.address", i, node.address.span());
        put("node.zone", i, node.zone.span());
        put("node.profile", i, node.profile.span());
    }
    if let Some(storage) = &raw.storage {
        put("storage.endpoint", 0, storage.endpoint.span());
        put("storage.bucket", 0, storage.bucket.span());
        put("storage.region", 0, storage.region.span());
    }
    if let Some(backup) = &raw.backup {
        put("backup", 0, backup.span());
        let inner = backup.get_ref();
        inner.directory.iter().for_each(|text| put("backup.directory", 0, text.span()));
        inner.keep.iter().for_each(|number| put("backup.keep", 0, number.span()));
    }
    if let Some(postgres) = &raw.external.postgres {
        put("external.postgres.host", 0, postgres.host.span());
        put("external.postgres.ca", 0, postgres.ca.span());
        for (key, text) in [
            ("external.postgres.database", &postgres.database),
            ("external.postgres.user", &postgres.user),
        ] {
            text.iter().for_each(|text| put(key, 0, text.span()));
        }
    }
    if let Some(redis) = &raw.external.redis {
        put("external.redis.host", 0, redis.host.span());
        put("external.redis.ca", 0, redis.ca.span());
    }
    let tuning = &raw.tuning;
    for (key, number) in [
        ("tuning.patroni_ttl", &tuning.patroni_ttl),
        ("tuning.patroni_loop_wait", &tuning.patroni_loop_wait),
        ("tuning.patroni_retry_timeout", &tuning.patroni_retry_timeout),
        ("tuning.vrrp_router_id", &tuning.vrrp_router_id),
    ] {
        number.iter().for_each(|number| put(key, 0, number.span()));
    }
    spans
}

fn explain_fault(
    source: &Source,
    spans: &BTreeMap<Place, Range<usize>>,
    fault: Fault,
) -> UserError {
    let mut error = match spans.get(&fault.place) {
        Some(span) => source.error(span.clone(), fault.what),
        None => UserError::new(fault.what).in_file(source.path()),
    };
    // A value that repeats another says where that one stands.
    let first = fault.first.and_then(|place| spans.get(&place));
    if let Some(span) = first {
        error = error.why(format!("line {} has it already", source.line(span.start)));
    } else if let Some(why) = fault.why {
        error = error.why(why);
    }
    match fault.help {
        Some(help) => error.help(help),
        None => error,
    }
}
