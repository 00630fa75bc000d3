//! Seeds on ISO 9660 volumes, as an independent program writes them for cloud-init.

#[path = "support/tools.rs"]
mod tools;

use std::fs::{self, File};

use stanchion::seed::volume::{Volume, read_seed};
use tools::find_tools;

#[test]
fn seeds_are_read_from_cloud_drives_of_each_flavour() {
    let Some(tools) = find_tools(&["xorriso"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let from = folder.path().join("from");
    fs::create_dir(&from).unwrap();
    let seed: Vec<u8> = (0..20_000u32).map(|i| (i / 7) as u8).collect();
    // Others beside it, so many that the folder fills several sectors.
    for number in 0..60 {
        fs::write(from.join(format!("a-neighbour-{number}.txt")), [number]).unwrap();
    }
    fs::create_dir(from.join("openstack")).unwrap();
    fs::write(from.join("meta-data"), "instance-id: n1\n").unwrap();
    for name in ["user-data", "stanchion-seed.json"] {
        let file = from.join(name);
        fs::write(&file, &seed).unwrap();
        for (label, flavour) in [
            ("cidata", &["-joliet", "-rock"][..]),
            ("CIDATA", &["-rock"]),
            ("cidata", &["-joliet", "--norock"]),
            ("CIDATA", &["--norock"]),
            ("CIDATA", &["--norock", "-iso-level", "1"]),
        ] {
            let image = folder.path().join("image");
            let _ = fs::remove_file(&image);
            let made = tools
                .command("xorriso")
                .unwrap()
                .args(["-as", "genisoimage", "-quiet", "-volid", label])
                .args(flavour)
                .arg("-output")
                .arg(&image)
                .arg(&from)
                .run();
            made.unwrap_or_else(|error| panic!("{error:?}"));
            let file = File::open(&image).unwrap();
            let volume = Volume::open(&file).unwrap();
            assert_eq!(volume.label().unwrap(), label);
            let read = read_seed(&file).unwrap();
            assert!(read.as_ref() == Some(&seed), "{name}, {label}, {flavour:?}");
            let folder = volume.read_first(&["openstack", "nothing"]).unwrap();
            assert_eq!(folder, None);
        }
        fs::remove_file(file).unwrap();
    }
}
