use crate::Sandbox;

/// Lines of a layer's file, from line 2 on, and what is said about them.
fn check(lines: &str, expected: &str) {
    assert_eq!(Sandbox::with_layer(lines).mistake(), expected, "{lines}");
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest() {
    check(
        "\npacakges = []",
        "unknown key `pacakges`\n  at: layers/a/layer.toml:3\n  why: a layer has no such key\n  help: did you mean `packages`?",
    );
    check(
        "quux = 1",
        "unknown key `quux`\n  at: layers/a/layer.toml:2\n  why: a layer has no such key\n  help: the keys are: description, role, requires, packages, provides, recommends, exclude, remove, commands, agent, artifact, build, python, user, group, units, variables, owners, initrd, kernel",
    );
    check(
        "[units]\nenabel = []",
        "unknown key `enabel`\n  at: layers/a/layer.toml:3\n  why: `units` has no such key\n  help: did you mean `enable`?",
    );
    check(
        "[[user]]\nname = \"a\"\nid = 200\nhomw = \"/x\"",
        "unknown key `homw`\n  at: layers/a/layer.toml:5\n  why: `user` has no such key\n  help: did you mean `home`?",
    );
    check(
        "[owners]\n\"/etc/x\" = { owner = \"root\", gruop = \"x\" }",
        "unknown key `gruop`\n  at: layers/a/layer.toml:3\n  why: `owners./etc/x` has no such key\n  help: did you mean `group`?",
    );
    check(
        "\"a`, expected one of `x`\\n\" = 1",
        "unknown key `a`, expected one of `x`\\n`\n  at: layers/a/layer.toml:2\n  why: a layer has no such key\n  help: the keys are: description, role, requires, packages, provides, recommends, exclude, remove, commands, agent, artifact, build, python, user, group, units, variables, owners, initrd, kernel",
    );
}

#[test]
fn a_wrong_type_is_told_with_what_was_expected_and_what_is_there() {
    check(
        "packages = \"patroni\"",
        "`packages` must be an array, not the string `patroni`\n  at: layers/a/layer.toml:2",
    );
    check(
        "packages = [\n  \"a\",\n  1,\n]",
        "an item of `packages` must be a string, not the number `1`\n  at: layers/a/layer.toml:4",
    );
    check(
        "recommends = 1979-05-27",
        "`recommends` must be a boolean, not a date\n  at: layers/a/layer.toml:2",
    );
    check(
        "units = true",
        "`units` must be a table with `enable`, `disable` or `mask`, not `true`\n  at: layers/a/layer.toml:2",
    );
    check(
        "remove = [\"/usr/share/doc/*\"]",
        "an item of `remove` must be a table with `path` and `reason`, not the string `/usr/share/doc/*`\n  at: layers/a/layer.toml:2",
    );
    check(
        "[artifact]\nname = \"x\"",
        "`artifact` must be an array, not a table\n  at: layers/a/layer.toml:2\n  help: write `[[artifact]]`",
    );
    check(
        "[[user]]\nname = \"x\"\nid = -1",
        "`user.id` must be a whole number, not the number `-1`\n  at: layers/a/layer.toml:4",
    );
    check(
        "[owners]\n\"/x\" = { mode = 644 }",
        "`owners./x.mode` must be an octal mode in quotes such as \"0644\", not the number `644`\n  at: layers/a/layer.toml:3",
    );
}

#[test]
fn a_missing_key_is_named_with_the_table_that_needs_it() {
    let sandbox = Sandbox::new(&[("layers/a/layer.toml", "[units]\n")]);
    assert_eq!(
        sandbox.mistake(),
        "missing key `description`\n  at: layers/a/layer.toml:1\n  why: a layer needs it"
    );
    check(
        "[[remove]]\npath = \"/x\"\n",
        "missing key `reason`\n  at: layers/a/layer.toml:2\n  why: `remove` needs it",
    );
    check("description = \"b\"", "the key `description` is doubled\n  at: layers/a/layer.toml:2");
    let sandbox = Sandbox::new(&[("layers/a/layer.toml", "description = \" \"")]);
    assert_eq!(sandbox.mistake(), "`description` is empty\n  at: layers/a/layer.toml:1");
}

#[test]
fn bad_toml_is_told_with_its_line() {
    check(
        "packages = [\"a\"\n",
        "TOML syntax: unclosed array, expected `]`\n  at: layers/a/layer.toml:2",
    );
    check(
        "packages = nope",
        "TOML syntax: invalid float, expected `nan`, found `nope`\n  at: layers/a/layer.toml:2",
    );
    let sandbox = Sandbox::new(&[]);
    sandbox.write("layers/a/layer.toml", b"description = \"a\"\n# \xff\n");
    assert_eq!(sandbox.mistake(), "the file is not UTF-8 text\n  at: layers/a/layer.toml:2");
    sandbox.write("layers/a/layer.toml", "#".repeat((1 << 20) + 1));
    assert_eq!(
        sandbox.mistake(),
        "layers/a/layer.toml is too long\n  at: layers/a/layer.toml\n  why: a layer may have 1024 KiB"
    );
}

#[test]
fn packages_are_named_as_debian_names_them_and_once() {
    check(
        "packages = [\n\"patroni\",\n\"Patroni\"]",
        "bad package name `Patroni`\n  at: layers/a/layer.toml:4\n  help: a Debian package name has lower-case letters, digits, `+`, `-` and `.`; a version follows `=`, and there is no architecture",
    );
    for bad in ["", "x", "-ab", "libc6:amd64", "a b", "../x", "ab\\n"] {
        let message = Sandbox::with_layer(&format!("packages = [\"{bad}\"]")).mistake();
        assert!(message.starts_with("bad package name `"), "{message}");
    }
    check(
        "packages = [\"patroni=\"]",
        "bad version `` of the package `patroni`\n  at: layers/a/layer.toml:2\n  help: a Debian version begins with a digit, such as `17.4-1` or `1:9.0~rc1-2`",
    );
    check(
        "packages = [\"patroni\",\n\"etcd-server\",\n\"patroni=4.0\"]",
        "the package `patroni` is there twice\n  at: layers/a/layer.toml:4\n  why: line 2 has it already",
    );
}

#[test]
fn roles_are_those_there_are() {
    check(
        "role = \"edeg\"",
        "there is no role `edeg`\n  at: layers/a/layer.toml:2\n  help: did you mean `edge`?",
    );
    check(
        "role = \"everything\"",
        "there is no role `everything`\n  at: layers/a/layer.toml:2\n  help: the roles are: db, cache, web, edge",
    );
    check("role = [\"db\"]", "`role` must be a string, not an array\n  at: layers/a/layer.toml:2");
}

#[test]
fn versions_are_written_as_debian_writes_them() {
    for good in ["1", "17.4-1", "1:9.0~rc1-2", "4.0.5+dfsg-1+deb13u2"] {
        Sandbox::with_layer(&format!("packages = [\"patroni={good}\"]")).profile();
        Sandbox::with_layer(&format!("provides = [\"patroni (= {good})\"]")).profile();
    }
    for bad in ["", "v1", "1:", ":1", "a:1", "1-", "1 ", "1_2", "1:2:3", "99999999999:1", ">=1"] {
        let message = Sandbox::with_layer(&format!("packages = [\"patroni={bad}\"]")).mistake();
        assert!(message.starts_with(&format!("bad version `{bad}` of")), "{message}");
        let message = Sandbox::with_layer(&format!("provides = [\"ab (= {bad})\"]")).mistake();
        assert!(message.starts_with(&format!("bad provided package `ab (= {bad})`")), "{message}");
    }
}

#[test]
fn provided_packages_are_written_as_debian_writes_them_and_once() {
    check(
        "provides = [\n\"locales\",\n\"Locales\"]",
        "bad provided package `Locales`\n  at: layers/a/layer.toml:4\n  help: write `name` or `name (= version)`, such as `locales (= 2.41-12)`",
    );
    for bad in
        ["", "x", "-ab", "locales=2.41", "locales (>= 2)", "locales (2)", "ab  (= 1)", "ab (= 1) "]
    {
        let message = Sandbox::with_layer(&format!("provides = [\"{bad}\"]")).mistake();
        assert!(message.starts_with(&format!("bad provided package `{bad}`")), "{message}");
    }
    check(
        "provides = [\"locales\",\n\"ssl-cert\",\n\"locales (= 2)\"]",
        "the provided package `locales` is there twice\n  at: layers/a/layer.toml:4\n  why: line 2 has it already",
    );
}

#[test]
fn units_are_named_as_systemd_names_them_and_once() {
    check(
        "[units]\nenable = [\"patroni\"]",
        "bad unit name `patroni`\n  at: layers/a/layer.toml:3\n  help: write its type too, such as `patroni.service`",
    );
    check(
        "[units]\nmask = [\"patroni.servce\"]",
        "bad unit name `patroni.servce`\n  at: layers/a/layer.toml:3\n  help: the types are: service, socket, device, mount, automount, swap, target, path, timer, slice, scope",
    );
    check(
        "[units]\ndisable = [\"a/b.service\"]",
        "bad unit name `a/b.service`\n  at: layers/a/layer.toml:3\n  help: a unit name has letters, digits and `:-_.\\@`, at most 255",
    );
    check(
        "[units]\nenable = [\"a.service\"]\nmask = [\"a.service\"]",
        "the unit `a.service` is there twice\n  at: layers/a/layer.toml:4\n  why: line 3 has it already",
    );
}

#[test]
fn artifacts_have_a_digest_a_url_and_an_absolute_path() {
    let check_artifact = |changed: &str, expected: &str| {
        let mut lines = [
            "name = \"netbox\"".to_string(),
            "url = \"https://example.org/netbox.tar.gz\"".to_string(),
            format!("sha256 = \"{}\"", "ab".repeat(32)),
            "path = \"/opt/netbox\"".to_string(),
        ];
        let key = changed.split(' ').next().unwrap();
        match lines.iter_mut().find(|line| line.split(' ').next() == Some(key)) {
            Some(line) => *line = changed.to_string(),
            None => lines[3].push_str(&format!("\n{changed}")),
        }
        check(&format!("[[artifact]]\n{}", lines.join("\n")), expected);
    };
    check_artifact(
        "sha256 = \"abc\"",
        "bad SHA-256 digest `abc`\n  at: layers/a/layer.toml:5\n  help: write its 64 hexadecimal digits",
    );
    check_artifact(
        &format!("sha256 = \"{}\"", "+a".repeat(32)),
        &format!(
            "bad SHA-256 digest `{}…`\n  at: layers/a/layer.toml:5\n  help: write its 64 hexadecimal digits",
            "+a".repeat(30)
        ),
    );
    check_artifact(
        "url = \"ftp://example.org/x\"",
        "bad URL `ftp://example.org/x`\n  at: layers/a/layer.toml:4\n  help: write `https://HOST/PATH` in ASCII, without blanks",
    );
    check_artifact(
        "path = \"opt/netbox\"",
        "bad path `opt/netbox` in `artifact.path`\n  at: layers/a/layer.toml:6\n  help: write an absolute path, beginning with `/`",
    );
    check_artifact(
        "path = \"/opt/../etc\"",
        "bad path `/opt/../etc` in `artifact.path`\n  at: layers/a/layer.toml:6\n  help: write it without `.`, `..`, doubled `/` or a `/` at its end",
    );
    check_artifact(
        "path = \"/lib/netbox\"",
        "bad path `/lib/netbox` in `artifact.path`\n  at: layers/a/layer.toml:6\n  help: in the image this is a symlink: write `/usr/lib`",
    );
    check_artifact(
        "strip = 1",
        "`artifact.strip` without `unpack = true`\n  at: layers/a/layer.toml:7\n  why: only what is unpacked has path parts to drop",
    );
    check_artifact(
        "name = \"../netbox\"",
        "bad artifact name `../netbox`\n  at: layers/a/layer.toml:3\n  help: a name has lower-case letters, digits and `-`, at most 60",
    );
}

#[test]
fn users_have_names_and_ids_that_collide_with_nothing() {
    check(
        "[[user]]\nname = \"0netbox\"\nid = 980",
        "bad user name `0netbox`\n  at: layers/a/layer.toml:3\n  help: a name has lower-case letters, digits, `_` and `-`, begins with no digit, and has at most 32",
    );
    check(
        "[[user]]\nname = \"netbox\"\nid = 0",
        "bad user id `0`\n  at: layers/a/layer.toml:4\n  help: take one from 100 to 59999",
    );
    check(
        "[[user]]\nname = \"netbox\"\nid = 980\nhome = \"var\"",
        "bad path `var` in `user.home`\n  at: layers/a/layer.toml:5\n  help: write an absolute path, beginning with `/`",
    );
    check(
        "[[user]]\nname = \"netbox\"\nid = 980\n[[user]]\nname = \"redis\"\nid = 980",
        "two users have the id 980\n  at: layers/a/layer.toml:6\n  why: layers/a/layer.toml:3 has it already",
    );
    check(
        "[[user]]\nname = \"netbox\"\nid = 980\ngroups = [\"redis\", \"redis\"]",
        "the group `redis` is there twice\n  at: layers/a/layer.toml:5\n  why: line 5 has it already",
    );
}

#[test]
fn groups_have_names_and_ids_that_collide_with_nothing() {
    check(
        "[[group]]\nname = \"0render\"\nid = 816",
        "bad group name `0render`\n  at: layers/a/layer.toml:3\n  help: a name has lower-case letters, digits, `_` and `-`, begins with no digit, and has at most 32",
    );
    check(
        "[[group]]\nname = \"render\"\nid = 60000",
        "bad group id `60000`\n  at: layers/a/layer.toml:4\n  help: take one from 100 to 59999",
    );
    check(
        "[[group]]\nname = \"render\"",
        "missing key `id`\n  at: layers/a/layer.toml:2\n  why: `group` needs it",
    );
    check(
        "[[group]]\nname = \"render\"\nid = 816\nhome = \"/x\"",
        "unknown key `home`\n  at: layers/a/layer.toml:5\n  why: `group` has no such key\n  help: did you mean `name`?",
    );
    check(
        "[[group]]\nname = \"render\"\nid = 816\n[[group]]\nname = \"render\"\nid = 817",
        "the group `render` is there twice\n  at: layers/a/layer.toml:6\n  why: layers/a/layer.toml:3 has it already",
    );
    check(
        "[[group]]\nname = \"render\"\nid = 816\n[[group]]\nname = \"kvm\"\nid = 816",
        "two groups have the id 816\n  at: layers/a/layer.toml:6\n  why: layers/a/layer.toml:3 has it already",
    );
    check(
        "[[group]]\nname = \"etcd\"\nid = 816\n[[user]]\nname = \"etcd\"\nid = 901",
        "`etcd` is both a user, which brings its group, and a group\n  at: layers/a/layer.toml:3\n  why: layers/a/layer.toml:6 has it already",
    );
    check(
        "[[user]]\nname = \"etcd\"\nid = 901\n[[group]]\nname = \"kvm\"\nid = 901",
        "a user, and so its group, and a group have the id 901\n  at: layers/a/layer.toml:6\n  why: layers/a/layer.toml:3 has it already",
    );
}

#[test]
fn patterns_are_absolute_and_do_not_match_everything() {
    check(
        "exclude = [\"usr/share/doc/*\"]",
        "bad pattern `usr/share/doc/*` in `exclude`\n  at: layers/a/layer.toml:2\n  help: write an absolute pattern, beginning with `/`",
    );
    check(
        "exclude = [\"/usr/../*\"]",
        "bad pattern `/usr/../*` in `exclude`\n  at: layers/a/layer.toml:2\n  help: write it without `.` and `..`",
    );
    check(
        "[[remove]]\npath = \"/*\"\nreason = \"x\"",
        "bad pattern `/*` in `remove.path`\n  at: layers/a/layer.toml:3\n  help: this is every file of the image: write a longer pattern",
    );
    check(
        "[[remove]]\npath = \"/usr/x\"\nreason = \"\"",
        "`remove.reason` is empty\n  at: layers/a/layer.toml:4",
    );
}

#[test]
fn kernel_arguments_modules_and_commands_are_checked() {
    check(
        "[kernel]\ncmdline = [\"quiet splash\"]",
        "bad kernel argument `quiet splash`\n  at: layers/a/layer.toml:3\n  help: one argument an item: [\"quiet\", \"console=ttyS0\"]",
    );
    check(
        "[initrd]\nmodules = [\"virtio/virtio_net.ko\"]",
        "bad kernel module name `virtio/virtio_net.ko`\n  at: layers/a/layer.toml:3\n  help: write it without folder and without `.ko`, such as `virtio_net`",
    );
    check("commands = [\"\"]", "`commands` is empty\n  at: layers/a/layer.toml:2");
}

#[test]
fn variables_have_names_that_a_template_can_say() {
    check(
        "[variables]\nmax-connections = 1",
        "bad variable name `max-connections`\n  at: layers/a/layer.toml:3\n  help: write `max_connections`",
    );
    check(
        "[variables]\n\"0a\" = 1",
        "bad variable name `0a`\n  at: layers/a/layer.toml:3\n  help: a variable's name has letters, digits and `_`",
    );
    check(
        "[variables]\nsince = { a = [1979-05-27] }",
        "the variable `since` holds a date\n  at: layers/a/layer.toml:3\n  help: put it in quotes",
    );
}

#[test]
fn a_build_stage_says_what_of_it_is_kept_and_where_it_begins() {
    check(
        "[build]\ncommands = [\"true\"]",
        "`[build]` keeps nothing\n  at: layers/a/layer.toml:3\n  why: only the paths of `build.keep` and virtualenvs go into the layer\n  help: name what it makes: `keep = [\"/opt/x\"]`",
    );
    for path in ["/etc/x", "/var/lib/x", "/run/x", "/tmp", "/root/x"] {
        let first = path.split('/').nth(1).unwrap();
        check(
            &format!("[build]\nkeep = [\"{path}\"]"),
            &format!(
                "nothing below `/{first}` can be kept of a build stage\n  at: layers/a/layer.toml:3\n  help: let the stage make it below /usr or /opt"
            ),
        );
    }
    check(
        "[build]\nkeep = [\"/opt/../etc\"]",
        "bad path `/opt/../etc` in `build.keep`\n  at: layers/a/layer.toml:3\n  help: write it without `.`, `..`, doubled `/` or a `/` at its end",
    );
    check(
        "[build]\nkeep = [\"/opt/x/y\", \"/opt/x\"]",
        "`/opt/x/y` and `/opt/x` overlap\n  at: layers/a/layer.toml:3\n  help: name the outer one only",
    );
    check(
        "[build]\nover = \"b\"\nkeep = [\"/opt/x\"]",
        "`b` is no layer below `a`\n  at: layers/a/layer.toml:3\n  why: a build stage begins on a layer that comes before its own\n  help: add `b` to `requires`",
    );
    check(
        "[build]\npackages = [\"Gcc\"]\nkeep = [\"/opt/x\"]",
        "bad package name `Gcc`\n  at: layers/a/layer.toml:3\n  help: a Debian package name has lower-case letters, digits, `+`, `-` and `.`; a version follows `=`, and there is no architecture",
    );
    check(
        "[build]\nkepe = []",
        "unknown key `kepe`\n  at: layers/a/layer.toml:3\n  why: `build` has no such key\n  help: did you mean `keep`?",
    );
}

#[test]
fn virtualenvs_have_requirements_that_are_names_and_versions() {
    let check_python = |requirements: &str, expected: &str| {
        check(&format!("[[python]]\npath = \"/opt/v\"\nrequirements = {requirements}"), expected);
    };
    for bad in ["-r x", "a @ https://example.org/a", "./a", "a;b", "a==1 b"] {
        check_python(
            &format!("[\"{bad}\"]"),
            &format!(
                "bad requirement `{bad}`\n  at: layers/a/layer.toml:4\n  help: write `name==1.2`, `name[extra]==1.2` or `name>=1.2,<2`, without blanks"
            ),
        );
    }
    check_python(
        "[]",
        "`python.requirements` is empty\n  at: layers/a/layer.toml:3\n  help: write what it installs: `requirements = [\"Django==6.0.8\"]`",
    );
    check_python(
        "[\"a_b==1\", \"A.B==2\"]",
        "the requirement `a-b` is there twice\n  at: layers/a/layer.toml:4\n  why: line 4 has it already",
    );
    check(
        "[[python]]\npath = \"/var/v\"\nrequirements = [\"a\"]",
        "nothing below `/var` can be kept of a build stage\n  at: layers/a/layer.toml:3\n  help: let the stage make it below /usr or /opt",
    );
}
