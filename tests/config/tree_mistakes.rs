use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use crate::Sandbox;

/// Files of the layer `a` and what is said about them.
fn check(paths: &[&str], expected: &str) {
    let sandbox = Sandbox::new(&[]);
    paths.iter().for_each(|path| sandbox.write(&format!("layers/a/{path}"), ""));
    assert_eq!(sandbox.mistake(), expected, "{paths:?}");
}

#[test]
fn what_has_no_place_in_a_layer_is_named() {
    check(
        &["tre/etc/motd"],
        "a layer has no place for `tre`\n  at: layers/a/tre\n  help: did you mean `tree`?",
    );
    check(
        &["README.md"],
        "a layer has no place for `README.md`\n  at: layers/a/README.md\n  help: files of the image go into `tree/`",
    );
    check(&["tree"], "`tree` is not a directory\n  at: layers/a/tree");
    check(
        &["initrd/etc/x"],
        "`initrd/` without `[initrd]`\n  at: layers/a/initrd\n  help: write `[initrd]` into layers/a/layer.toml",
    );
    check(
        &["build/usr/x"],
        "`build/` without `[build]`\n  at: layers/a/build\n  help: write `[build]` into layers/a/layer.toml",
    );
}

#[test]
fn two_files_that_become_one_are_both_named() {
    check(
        &["tree/etc/motd", "tree/etc/motd.j2"],
        "`/etc/motd` is doubled\n  at: layers/a/tree/etc/motd.j2\n  why: layers/a/tree/etc/motd becomes the same path of the image\n  help: keep one of them",
    );
    check(
        &["tree/etc/motd", "boot/etc/motd.j2"],
        "`/etc/motd` is doubled\n  at: layers/a/boot/etc/motd.j2\n  why: layers/a/tree/etc/motd becomes the same path of the image\n  help: keep one of them",
    );
    check(
        &["tree/etc/motd/x", "boot/etc/motd.j2"],
        "`/etc/motd` is doubled\n  at: layers/a/boot/etc/motd.j2\n  why: layers/a/tree/etc/motd becomes the same path of the image\n  help: keep one of them",
    );
}

#[test]
fn skeleton_and_tree_share_directories_only() {
    Sandbox::new(&[("layers/a/tree/etc/motd", ""), ("layers/a/skeleton/etc/issue", "")]).profile();
    check(
        &["tree/etc/motd", "skeleton/etc/motd"],
        "`/etc/motd` is doubled\n  at: layers/a/skeleton/etc/motd\n  why: layers/a/tree/etc/motd becomes the same path of the image\n  help: keep one of them",
    );
    check(
        &["tree/etc/motd.j2", "skeleton/etc/motd"],
        "`/etc/motd` is doubled\n  at: layers/a/skeleton/etc/motd\n  why: layers/a/tree/etc/motd.j2 becomes the same path of the image\n  help: keep one of them",
    );
    check(
        &["tree/etc/motd", "skeleton/etc/motd/x"],
        "`/etc/motd` is doubled\n  at: layers/a/skeleton/etc/motd\n  why: layers/a/tree/etc/motd becomes the same path of the image\n  help: keep one of them",
    );
    check(
        &["skeleton/etc/motd", "skeleton/etc/motd.j2"],
        "`/etc/motd` is doubled\n  at: layers/a/skeleton/etc/motd.j2\n  why: layers/a/skeleton/etc/motd becomes the same path of the image\n  help: keep one of them",
    );
    check(
        &["skeleton/bin/x"],
        "`/bin` is a symlink in the image\n  at: layers/a/skeleton/bin\n  help: move it to `layers/a/skeleton/usr/bin`",
    );
    check(&["skeleton"], "`skeleton` is not a directory\n  at: layers/a/skeleton");
}

#[test]
fn owners_do_not_reach_into_the_skeleton() {
    let sandbox = Sandbox::with_layer("[owners]\n\"/etc/x\" = { group = \"etcd\" }");
    sandbox.write("layers/a/skeleton/etc/x", "");
    assert_eq!(
        sandbox.mistake(),
        "`[owners]` names `/etc/x`, which this layer does not have\n  at: layers/a/layer.toml:3\n  why: neither `tree/` nor `boot/` holds it, and no artifact is put there"
    );
}

#[test]
fn files_where_the_image_has_symlinks_or_nothing_can_be_written_are_refused() {
    check(
        &["tree/lib/systemd/x"],
        "`/lib` is a symlink in the image\n  at: layers/a/tree/lib\n  help: move it to `layers/a/tree/usr/lib`",
    );
    check(
        &["boot/usr/bin/x"],
        "`/usr` is read-only\n  at: layers/a/boot/usr\n  why: at boot the agent can write below /etc, /run and /var only\n  help: move it to `tree/`, to be laid when the image is built",
    );
    check(&["tree/etc/.j2"], "a template has no name but `.j2`\n  at: layers/a/tree/etc/.j2");
}

#[test]
fn sockets_devices_and_odd_names_are_refused() {
    let sandbox = Sandbox::new(&[("layers/a/tree/run/x", "")]);
    let _listener = UnixListener::bind(sandbox.path().join("layers/a/tree/run/s")).unwrap();
    assert_eq!(
        sandbox.mistake(),
        "a socket cannot be laid into an image\n  at: layers/a/tree/run/s\n  help: let systemd-tmpfiles make it, or a unit"
    );
    let sandbox = Sandbox::new(&[("layers/a/tree/run/x", "")]);
    let pipe = sandbox.path().join("layers/a/tree/run/p");
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, rustix::fs::Mode::RUSR, 0).unwrap();
    assert_eq!(
        sandbox.mistake(),
        "a named pipe cannot be laid into an image\n  at: layers/a/tree/run/p\n  help: let systemd-tmpfiles make it, or a unit"
    );
    check(
        &["tree/etc/a\nb"],
        "bad file name `a\\nb`\n  at: layers/a/tree/etc\n  help: file names are UTF-8 text on one line",
    );
    let sandbox = Sandbox::new(&[("layers/a/tree/etc/x", "")]);
    fs::write(sandbox.path().join("layers/a/tree/etc").join(OsStr::from_bytes(b"\xff")), "")
        .unwrap();
    assert_eq!(
        sandbox.mistake(),
        "bad file name `\u{fffd}`\n  at: layers/a/tree/etc\n  help: file names are UTF-8 text on one line"
    );
}

#[test]
fn a_symlink_is_neither_a_template_nor_owned() {
    let sandbox = Sandbox::new(&[("layers/a/tree/etc/x", "")]);
    symlink("x", sandbox.path().join("layers/a/tree/etc/y.j2")).unwrap();
    assert_eq!(
        sandbox.mistake(),
        "a template cannot be a symlink\n  at: layers/a/tree/etc/y.j2\n  help: drop `.j2` from its name, or copy the template"
    );
    let sandbox = Sandbox::with_layer("[owners]\n\"/etc/y\" = { mode = \"0600\" }");
    sandbox.write("layers/a/tree/etc/x", "");
    symlink("x", sandbox.path().join("layers/a/tree/etc/y")).unwrap();
    assert_eq!(
        sandbox.mistake(),
        "a symlink has no owner of its own\n  at: layers/a/layer.toml:3\n  help: name the file that it leads to"
    );
}

#[test]
fn owners_name_files_that_are_there() {
    let check = |lines: &str, expected: &str| {
        let sandbox = Sandbox::with_layer(&format!("[owners]\n{lines}"));
        sandbox.write("layers/a/tree/usr/bin/foo", "");
        assert_eq!(sandbox.mistake(), expected);
    };
    check(
        "\"/usr/bin/fo\" = { mode = \"0755\" }",
        "`[owners]` names `/usr/bin/fo`, which this layer does not have\n  at: layers/a/layer.toml:3\n  why: neither `tree/` nor `boot/` holds it, and no artifact is put there\n  help: did you mean `/usr/bin/foo`?",
    );
    check(
        "\"/usr/bin/foo\" = { mode = \"0999\" }",
        "bad mode `0999`\n  at: layers/a/layer.toml:3\n  help: write three or four octal digits, such as `0644`",
    );
    check(
        "\"usr/bin/foo\" = {}",
        "bad path `usr/bin/foo` in `owners`\n  at: layers/a/layer.toml:3\n  help: write an absolute path, beginning with `/`",
    );
    check(
        "\"/usr/bin/foo\" = { group = \"post gres\" }",
        "bad group name `post gres`\n  at: layers/a/layer.toml:3\n  help: a name has lower-case letters, digits, `_` and `-`, begins with no digit, and has at most 32",
    );
}

#[test]
fn what_no_image_would_hold_is_refused() {
    check(
        &["tree/var/lib/a/x"],
        "`/var` is never in an image\n  at: layers/a/tree/var\n  help: each machine begins with an empty /var: ship the file under /usr, and let a line of type `C` in /usr/lib/tmpfiles.d copy it",
    );
    check(
        &["tree/etc/hostname"],
        "`/etc/hostname` is never in an image\n  at: layers/a/tree/etc/hostname\n  help: each machine has its own",
    );
}
