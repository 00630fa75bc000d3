//! Whatever stands in the files, reading them ends in a profile or in a message.

use proptest::prelude::*;
use stanchion::error::exit_code;

use crate::Sandbox;

/// Keys, values and punctuation of both files, so that some of it is nearly right.
const PIECES: &str = "(description = \"x\"\n|layers = \\[\"a\"\\]\n|requires|packages|provides|\\[\\[remove\\]\\]\n|path|reason|\\[\\[artifact\\]\\]\n|sha256|strip|unpack|\\[build\\]\n|keep|over|\\[\\[python\\]\\]\n|requirements|\\[\\[user\\]\\]\n|name|id|\\[units\\]\n|enable|\\[owners\\]\n|\"/etc/x\"|mode|\\[initrd\\]\n|\\[kernel\\]\n|cmdline|\\[disk\\]\n|size|\\[variables\\]\n| = |\"[a-z/.=é]{0,6}\"|\"[0-9]{1,3}(MiB|GiB|TiB)\"|-?[0-9]{1,12}|true|1979-05-27|nan|\\[|\\]|\\{|\\}|,|\\.|\n|#|'|\"){0,40}";

fn check(path: &str, bytes: &[u8]) {
    let sandbox = Sandbox::new(&[]);
    sandbox.write(path, bytes);
    if let Err(error) = sandbox.load() {
        assert_eq!(exit_code(&error), 2, "{error:#}");
        assert!(error.to_string().contains("\n  at: "), "{error:#}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_bytes_end_in_a_message(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        check("layers/a/layer.toml", &bytes);
        check("profiles/p.toml", &bytes);
    }

    #[test]
    fn random_toml_ends_in_a_profile_or_a_message(text in PIECES) {
        check("layers/a/layer.toml", text.as_bytes());
        check("profiles/p.toml", text.as_bytes());
        check("layers/a/layer.toml", format!("description = \"x\"\n{text}").as_bytes());
        let profile = format!("description = \"x\"\nlayers = [\"a\"]\n{text}");
        check("profiles/p.toml", profile.as_bytes());
    }

    #[test]
    fn any_value_under_any_key_ends_in_a_profile_or_a_message(
        key in "(description|requires|packages|provides|recommends|exclude|remove|commands|artifact|build|python|user|group|units|variables|owners|initrd|kernel|layers|formats|disk)(\\.(enable|packages|keep|over|requirements|cmdline|size|x))?",
        value in "(\".{0,8}\"|-?[0-9]{1,4}|true|nan|1979-05-27|\\[(\".{0,8}\"|[0-9]|\\{ (path|name|id|reason) = \".{0,8}\" \\})?\\]|\\{ ([a-z]{1,3} = (1|\"x\"|\\{\\}))? \\})",
    ) {
        check("layers/a/layer.toml", format!("description = \"x\"\n{key} = {value}").as_bytes());
        let profile = format!("description = \"x\"\nlayers = [\"a\"]\n{key} = {value}");
        check("profiles/p.toml", profile.as_bytes());
    }
}

#[test]
fn deep_and_wide_toml_ends_in_a_message() {
    for text in [
        format!("variables = {}", "[".repeat(100_000)),
        format!("variables = {}{}", "[".repeat(50_000), "]".repeat(50_000)),
        format!("variables.{} = 1", "a.".repeat(50_000) + "a"),
        format!("{} = 1", "variables.".repeat(20_000) + "a"),
        format!("[{}]", "variables.".repeat(20_000) + "a"),
        "[[variables.a]]\n".repeat(20_000),
        "variables = ".to_string() + &"{a=".repeat(50_000),
    ] {
        check("layers/a/layer.toml", format!("description = \"x\"\n{text}").as_bytes());
    }
}
