//! I14, SAFETY row 77: where a password must not stand is read at the end of every live test. The passfile (0600, in the run directory)
//! and the secret files are where they have to stand, and are not read.

use std::fs;
use std::path::{Path, PathBuf};

use pgherd::cli::demo::runtime::in_own_thread;

use super::world::World;

/// Every key of every cluster of the rig.
const PREFIX: &str = "/pgherd/";

/// A place that was read, and what stands there.
type Place = (String, String);

fn read(path: &Path) -> Place {
    (path.display().to_string(), String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned())
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect()
}

/// All places where a password was found.
pub fn found(world: &World) -> Vec<String> {
    let secrets = ["superuser", "replication"].map(|name| read(&world.cluster.plan.dir.join("secrets").join(name)).1);
    assert!(secrets.iter().all(|secret| secret.trim().len() > 4), "the passwords were read");
    let holds_one = |text: &str| secrets.iter().any(|secret| text.contains(secret.trim()));
    let all = places(world);
    all.into_iter().filter(|(_, text)| holds_one(text)).map(|(place, _)| place).collect()
}

/// Logs, arguments of processes, PostgreSQL's configuration, what the API says, and all keys in etcd.
fn places(world: &World) -> Vec<Place> {
    let mut places = Vec::new();
    for index in 0..world.nodes() {
        places.push(read(&world.cluster.node_log(index)));
        places.extend(files(&world.cluster.node_dir(index).join("log")).iter().map(|path| read(path)));
        // postgresql.conf, postgresql.auto.conf, pg_hba.conf, and what they were before.
        let is_configuration = |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".conf"));
        places.extend(files(&world.cluster.data_dir(index)).iter().filter(is_configuration).map(|path| read(path)));
        for path in ["/metrics", "/patroni", "/cluster", "/config"] {
            let said = world.get(index, path).map(|(_, body)| (format!("{path} of {}", world.name(index)), body));
            places.extend(said);
        }
    }
    let arguments = |pid: i32| read(Path::new(&format!("/proc/{pid}/cmdline")));
    places.extend(world.cluster.household().living().iter().map(|found| arguments(found.id.pid)));
    places.extend(keys(world));
    places
}

/// Asks the members one by one: a client of several sends a request to one of them, and a test may have killed that one.
fn keys(world: &World) -> Vec<Place> {
    let endpoints: Vec<String> = world.cluster.plan.etcd.iter().map(|member| member.client_url()).collect();
    let found = in_own_thread(async move {
        let mut refusals = Vec::new();
        for endpoint in endpoints {
            match keys_at(&endpoint).await {
                Ok(keys) => return Ok(keys),
                Err(refusal) => refusals.push(format!("{endpoint}: {refusal}")),
            }
        }
        anyhow::bail!("no member of etcd answers: {}", refusals.join("; "))
    })
    .unwrap();
    assert!(!found.is_empty(), "etcd has keys of the cluster");
    found
}

async fn keys_at(endpoint: &str) -> Result<Vec<Place>, etcd_client::Error> {
    let mut client = etcd_client::Client::connect([endpoint], None).await?;
    let all = client.get(PREFIX, Some(etcd_client::GetOptions::new().with_prefix())).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(all.kvs().iter().map(|key| (format!("etcd's {}", text(key.key())), text(key.value()))).collect())
}
