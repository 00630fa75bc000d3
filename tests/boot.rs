//! The `db` image boots under OVMF, keeps what must live, forgets the rest, and serves no
//! byte of its root that is not the one that was built.

#[allow(dead_code, reason = "labs use other images")]
#[path = "support/image.rs"]
mod image;
#[path = "support/machine.rs"]
mod machine;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use image::Image;
use machine::{BEGIN, Machine, Outcome, read_answer};
use stanchion::digest::Digest;
use stanchion::disk::erofs_read::Erofs;
use stanchion::disk::gpt;
use stanchion::disk::guid::Guid;
use stanchion::disk::region::Region;
use stanchion::tools::set;

const BLOCK: u64 = 4096;
const GIB: u64 = 1 << 30;
/// Far more than a boot takes under emulation on two idle processors.
const LIMIT: Duration = Duration::from_secs(420);
/// What a machine writes when it has given up.
const ENDS: [&str; 4] = ["Kernel panic", "Freezing execution", "emergency mode", "Emergency Mode"];

/// `say NAME TEXT` writes one line, whatever the text holds.
const SAY: &str = r#"say() { printf '%s=%s\n' "$1" "$(printf %s "$2" | tr '\n' '|')"; }"#;

/// One machine at a time: two slow each other down.
fn wait_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A copy of the disk that a machine may write to.
struct Disk {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Disk {
    fn copy(image: &Image) -> Disk {
        let folder = tempfile::tempdir_in(image::scratch()).unwrap();
        let path = folder.path().join("disk.raw");
        let (from, to) = (File::open(&image.raw).unwrap(), File::create(&path).unwrap());
        let length = from.metadata().unwrap().len();
        to.set_len(length).unwrap();
        Region::whole(&to).unwrap().write_file_at(0, &from, length).unwrap();
        Disk { _folder: folder, path }
    }

    fn open(&self) -> File {
        File::options().read(true).write(true).open(&self.path).unwrap()
    }

    /// Flip one bit of the block that holds the bytes from `offset` of a file of the root.
    /// Returns the number of the block in the root partition.
    fn damage(&self, path: &str, offset: u64) -> u64 {
        let disk = self.open();
        let content = read_file(&disk, path);
        let wanted = &content[offset as usize..(offset + BLOCK) as usize];
        let partition = image::find_partition(&disk, "root-a");
        let block = find_block(&image::open_partition(&disk, "root-a"), wanted);
        let place = partition.start + block * BLOCK + 100;
        let mut byte = [0];
        disk.read_exact_at(&mut byte, place).unwrap();
        disk.write_all_at(&[byte[0] ^ 1], place).unwrap();
        assert_ne!(read_file(&disk, path), content);
        block
    }
}

fn read_file(disk: &File, path: &str) -> Vec<u8> {
    let erofs = Erofs::open(image::open_partition(disk, "root-a")).unwrap();
    let inode = erofs.find(path).unwrap().unwrap_or_else(|| panic!("no /{path}"));
    erofs.read(&inode, 64 << 20).unwrap()
}

/// The one block of a region with these bytes.
fn find_block(region: &Region, wanted: &[u8]) -> u64 {
    const PIECE: u64 = 1 << 20;
    let mut found = Vec::new();
    for at in (0..region.length()).step_by(PIECE as usize) {
        let piece = region.read_at(at, PIECE.min(region.length() - at) as usize).unwrap();
        let blocks = piece.chunks_exact(BLOCK as usize).enumerate();
        found.extend(
            blocks.filter(|(_, block)| *block == wanted).map(|(i, _)| at / BLOCK + i as u64),
        );
    }
    assert_eq!(found.len(), 1, "the block is to be there once: {found:?}");
    found[0]
}

/// Boot to multi-user and run the script; the machine powers off. Returns its console.
fn boot_and_ask(image: &Image, disk: &Disk, script: &str) -> String {
    let began = Instant::now();
    let script = format!("{SAY}\nsay state \"$(systemctl is-system-running --wait)\"\n{script}");
    let mut machine = Machine::start(&image.tools[0], &disk.path, &script, "");
    let outcome = machine.wait_for(&ENDS, LIMIT);
    let console = machine.console();
    assert_eq!(outcome, Outcome::PoweredOff, "the console:\n{console}");
    println!("{}", read_answer(&console, "time"));
    println!("from power-on through the checks to power-off: {:.0?}", began.elapsed());
    console
}

/// Boot what must not boot, until it has given up. `words` are for the kernel. Returns the
/// console.
fn boot_in_vain(image: &Image, disk: &Disk, words: &str) -> String {
    let mut machine = Machine::start(&image.tools[0], &disk.path, "true", words);
    let texts = [&ENDS[..], &[BEGIN, "Reached target multi-user.target"]].concat();
    let outcome = machine.wait_for(&texts, LIMIT);
    let console = machine.console();
    let gave_up = matches!(&outcome, Outcome::Saw(text) if ENDS.contains(&text.as_str()));
    assert!(gave_up, "{outcome:?}; the console:\n{console}");
    console
}

const HEALTH: &str = r#"
say failed "$(systemctl list-units --failed --plain --no-legend)"
say time "$(systemd-analyze time | head -n 1)"
say warnings "$(journalctl -b -p warning -o cat --no-pager | sort | uniq -c)"
say release "$(. /etc/os-release; echo "$IMAGE_ID $IMAGE_VERSION")"
say root "$(grep ' / ' /proc/mounts)"
say verity "$(cat /sys/block/dm-0/dm/name /sys/block/dm-0/dm/uuid)"
say usr "$(touch /usr/mark 2>&1)"
say marks "$(ls /etc/mark /var/mark 2>/dev/null)"
say etc "$(touch /etc/mark 2>&1)"
say var "$(touch /var/mark 2>&1)"
say id "$(cat /etc/machine-id)"
say online "$(/usr/lib/systemd/systemd-networkd-wait-online --any --timeout=90 2>&1)"
say listening "$(ss -Htuln)"
say logins "$(grep -lE 'getty|sshd|login$' /proc/[0-9]*/comm)"
say disk "$(cat /sys/block/vda/size)"
say room "$(df -B512 --output=size /var | tail -n 1)"
"#;
const PROGRAMS: &str = r#"
say postgres "$(/usr/lib/postgresql/17/bin/postgres --version)"
say patroni "$(patroni --version)"
say etcd "$(etcd --version | head -n 1)"
"#;
/// Nothing reads it before the script does.
const DAMAGED: &str = "usr/share/postgresql/17/information_schema.sql";
const DAMAGED_AT: u64 = 5 * BLOCK;

/// Two boots of one machine; between them its disk was enlarged and a file damaged.
struct Story {
    /// The consoles.
    first: String,
    second: String,
    /// Bytes of the disk at first, and how many were added.
    size: u64,
    added: u64,
    /// What the damaged file held, and the block in the root that was damaged.
    content: Vec<u8>,
    block: u64,
}

fn tell_story() -> Option<&'static Story> {
    static STORY: OnceLock<Story> = OnceLock::new();
    let image = image::provide(&[set::BOOT])?;
    Some(STORY.get_or_init(|| {
        let _turn = wait_turn();
        let disk = Disk::copy(image);
        let size = disk.open().metadata().unwrap().len();
        let first = boot_and_ask(image, &disk, &[HEALTH, PROGRAMS].concat());
        println!("warnings of the first boot:");
        read_answer(&first, "warnings").split('|').for_each(|line| println!("{line}"));

        let added = 4 * GIB;
        disk.open().set_len(size + added).unwrap();
        let content = read_file(&disk.open(), DAMAGED);
        let block = disk.damage(DAMAGED, DAMAGED_AT);
        let read = format!(
            r#"
say cat "$(cat /{DAMAGED} 2>&1 >/dev/null)"
say length "$(cat /{DAMAGED} 2>/dev/null | wc -c)"
say digest "$(cat /{DAMAGED} 2>/dev/null | sha256sum)"
say block "$(dd if=/dev/dm-0 of=/dev/null bs={BLOCK} skip={block} count=1 2>&1 | head -n 1)"
say next "$(dd if=/dev/dm-0 of=/dev/null bs={BLOCK} skip={} count=1 2>&1 | head -n 1)"
say kernel "$(journalctl -k -o cat --no-pager | grep -m 1 corrupted)"
"#,
            block + 1
        );
        let second = boot_and_ask(image, &disk, &[HEALTH, &read].concat());
        Story { first, second, size, added, content, block }
    }))
}

#[test]
fn a_machine_boots_from_the_verified_root_with_nothing_failed_and_nothing_open() {
    let Some(story) = tell_story() else { return };
    let image = image::provide(&[set::BOOT]).unwrap();
    for console in [&story.first, &story.second] {
        let answer = |name: &str| read_answer(console, name);
        assert_eq!(answer("failed"), "");
        assert_eq!(answer("state"), "running");
        assert_eq!(answer("release"), format!("db {}", image.manifest.version));
        assert!(answer("root").starts_with("/dev/mapper/root / erofs ro,"), "{}", answer("root"));
        assert!(answer("verity").starts_with("root|CRYPT-VERITY-"), "{}", answer("verity"));
        assert_eq!(answer("logins"), "");
        assert_eq!(answer("online"), "", "the network has no address");
        let listening = answer("listening");
        let open: Vec<&str> = listening.split('|').filter(|line| !is_closed(line)).collect();
        assert!(open.is_empty(), "{open:?}");
    }
    for (name, version) in [("postgres", " 17."), ("patroni", "patroni "), ("etcd", "etcd Version")]
    {
        let answer = read_answer(&story.first, name);
        assert!(answer.contains(version), "{answer}");
    }
}

/// Whether a line of `ss -Htuln` is a port that only this machine reaches, or the one at
/// which its own DHCP client gets answers.
fn is_closed(line: &str) -> bool {
    let local = line.split_whitespace().nth(4).unwrap_or_default();
    let (address, port) = local.rsplit_once(':').unwrap_or_default();
    address.starts_with("127.") || address == "[::1]" || ["68", "546"].contains(&port)
}

#[test]
fn a_machine_keeps_what_is_on_var_and_forgets_what_was_changed_in_etc() {
    let Some(Story { first, second, .. }) = tell_story() else { return };
    for console in [first, second] {
        let answer = |name: &str| read_answer(console, name);
        assert!(answer("usr").contains("Read-only file system"), "{}", answer("usr"));
        assert_eq!([answer("etc"), answer("var")], ["", ""], "neither can be written to");
        let id = answer("id");
        assert!(id.len() == 32 && id.bytes().all(|c| c.is_ascii_hexdigit()), "{id}");
    }
    assert_eq!(read_answer(first, "marks"), "");
    assert_eq!(read_answer(second, "marks"), "/var/mark");
    assert_eq!(read_answer(first, "id"), read_answer(second, "id"));
}

#[test]
fn var_fills_the_disk_and_grows_with_it() {
    let Some(Story { first, second, size, added, .. }) = tell_story() else { return };
    assert_eq!(read_number(first, "disk") * 512, *size);
    assert_eq!(read_number(second, "disk") * 512, size + added);
    // The slots and the ESP take 4.3 GiB, and ext4 some hundredths for itself.
    let taken = 43 * GIB / 10;
    for (console, size) in [(first, *size), (second, size + added)] {
        let room = read_number(console, "room") * 512;
        assert!(room > (size - taken) / 100 * 92, "/var has {room} of {size} bytes");
    }
}

fn read_number(console: &str, name: &str) -> u64 {
    read_answer(console, name).trim().parse().unwrap()
}

#[test]
fn a_damaged_file_cannot_be_read_and_what_is_before_the_damage_is_right() {
    let Some(Story { second, content, block, .. }) = tell_story() else { return };
    let answer = |name: &str| read_answer(second, name);
    assert!(answer("cat").contains("Input/output error"), "{}", answer("cat"));
    assert!(answer("block").contains("Input/output error"), "{}", answer("block"));
    assert!(answer("next").contains("1+0 records in"), "{}", answer("next"));
    assert!(answer("kernel").contains(&format!("data block {block}")), "{}", answer("kernel"));
    let length = read_number(second, "length");
    assert!(length <= DAMAGED_AT, "{length} bytes were read, the damage is at {DAMAGED_AT}");
    let expected = Digest::of(&content[..length as usize]).to_string();
    assert_eq!(answer("digest").split(' ').next(), Some(expected.as_str()));
}

#[test]
fn a_system_whose_first_program_is_damaged_does_not_start() {
    let Some(image) = image::provide(&[set::BOOT]) else { return };
    let _turn = wait_turn();
    let disk = Disk::copy(image);
    let block = disk.damage("usr/lib/systemd/systemd", 0);
    let console = boot_in_vain(image, &disk, "");
    assert!(console.contains(&format!("data block {block} is corrupted")), "{console}");
}

#[test]
fn a_root_that_is_not_the_one_of_the_kernels_hash_does_not_start() {
    let Some(image) = image::provide(&[set::BOOT]) else { return };
    let _turn = wait_turn();
    let disk = Disk::copy(image);
    let file = disk.open();
    let right = image.manifest.root_hash;
    let mut bytes = *right.as_bytes();
    bytes[7] ^= 0x10;
    let wrong = Digest::from_bytes(bytes);

    // The kernel finds the partitions by the wrong hash, and must notice at their content.
    let esp = image::open_partition(&file, "esp");
    let places = replace_all(&esp, &format!("roothash={right}"), &format!("roothash={wrong}"));
    assert_eq!(places, 1);
    let mut table = gpt::read(&Region::whole(&file).unwrap()).unwrap();
    let (root, verity) = Guid::split_root_hash(&wrong);
    for partition in &mut table.partitions {
        match partition.label.as_str() {
            "root-a" => partition.guid = root,
            "root-a-verity" => partition.guid = verity,
            _ => {}
        }
    }
    gpt::write(&table, &file, file.metadata().unwrap().len()).unwrap();

    // The device will not come: no need to wait for it as long as in earnest.
    let console = boot_in_vain(image, &disk, "systemd.default_device_timeout_sec=30");
    assert!(console.contains("metadata block 1 is corrupted"), "{console}");
    assert!(!console.contains("Mounted sysroot.mount"), "{console}");
}

/// Replace a text by one that is as long, and count how often.
fn replace_all(region: &Region, old: &str, new: &str) -> usize {
    let bytes = region.read_at(0, region.length() as usize).unwrap();
    let mut places = 0;
    let mut from = 0;
    while let Some(at) = find_text(&bytes[from..], old.as_bytes()) {
        region.write_at((from + at) as u64, new.as_bytes()).unwrap();
        places += 1;
        from += at + old.len();
    }
    places
}

fn find_text(bytes: &[u8], text: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + bytes[from..].iter().position(|byte| *byte == text[0])?;
        if bytes[at..].starts_with(text) {
            return Some(at);
        }
        from = at + 1;
    }
}
