//! What is made from the definitions of the command line, and the configuration's commands.

use crate::host::Host;
use std::fs;

#[test]
fn every_command_has_a_manual_page() {
    let host = Host::new();
    let dir = host.path("man");
    let done = host.run(&["man", &dir.display().to_string()]).success();
    assert!(done.out.contains("pages in"), "{}", done.out);
    let read = |name: &str| fs::read_to_string(dir.join(format!("{name}.8"))).expect(name);
    let top = read("hermitage");
    assert!(top.contains("hermitage\\-session(8)"), "{top}");
    let add = read("hermitage-account-add");
    assert!(add.contains("\\-\\-password\\-stdin") && add.contains(".SH NOTES"), "{add}");
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let page = fs::read_to_string(&path).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{}", path.display());
        // One that says nothing of what it does helps nobody.
        let name = page.split(".SH NAME\n").nth(1).and_then(|rest| rest.lines().next()).unwrap();
        assert!(name.contains(" \\- "), "{}: {name}", path.display());
    }
}

#[test]
fn shells_complete_every_command() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = host.run(&["completions", shell]).success().out;
        for word in ["account", "factory-reset", "password-stdin"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let bash = host.run(&["completions", "bash"]).success().out;
    fs::write(host.path("completions"), bash).unwrap();
    // As bash itself completes "hermitage account dis".
    let ask = "source \"$1\"; COMP_WORDS=(hermitage account dis); COMP_CWORD=2; \
               _hermitage hermitage dis account; echo \"${COMPREPLY[@]}\"";
    let path = host.path("completions");
    let output = std::process::Command::new("bash").args(["-c", ask, "ask"]).arg(path).output();
    assert_eq!(String::from_utf8(output.unwrap().stdout).unwrap().trim(), "disable");
    host.run(&["completions", "cmd.exe"]).fails(2, "cmd.exe");
}

#[test]
fn the_configuration_is_checked_and_shown() {
    let host = Host::new();
    let file = host.path("h.toml");
    let path = file.display().to_string();
    let with = |text: &str| fs::write(&file, text).unwrap();
    with("[ssh]\nmax_channels = 7\n");
    let done = host.run(&["--config", &path, "config", "check"]).success();
    assert!(done.out.contains("h.toml is right"), "{}", done.out);
    let shown = host.json(&["--config", &path, "config", "show"]);
    assert_eq!(
        (&shown["ssh"]["max_channels"], &shown["ssh"]["keepalive"]),
        (&7.into(), &30.into())
    );
    // What is shown is a configuration, and the same one.
    let text = host.run(&["--config", &path, "config", "show"]).success().out;
    with(&text);
    assert_eq!(host.json(&["--config", &path, "config", "show"]), shown);
    let defaults = host.run(&["config", "show", "--defaults"]).success().out;
    assert!(defaults.contains("# Seconds a client has to authenticate."), "{defaults}");
    with(&defaults);
    host.run(&["--config", &path, "config", "check"]).success();
    with("[ssh]\nmax_chanels = 7\n");
    let refused = host.run(&["--config", &path, "config", "check"]);
    assert_eq!(refused.err.matches("unknown field").count(), 1, "said once: {}", refused.err);
    refused.fails(1, "max_chanels");
    with("[ssh]\nbanner = \"/nowhere/banner\"\n");
    host.run(&["--config", &path, "config", "check"]).fails(1, "/nowhere/banner");
    with("[ssh]\nuser_ca_keys = \"/nowhere/keys\"\n");
    host.run(&["--config", &path, "config", "check"]).fails(1, "/nowhere/keys");
}
