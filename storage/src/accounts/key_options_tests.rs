use super::*;
use proptest::prelude::*;

fn parsed(text: &str) -> KeyOptions {
    KeyOptions::parse(text).unwrap()
}

fn refused(text: &str) -> String {
    KeyOptions::parse(text).unwrap_err().to_string()
}

#[test]
fn nothing_restricts_nothing() {
    let options = parsed("");
    assert!(options.is_empty() && options.pty && options.port_forwarding);
    assert!(options.allows_source([192, 0, 2, 1].into()) && !options.expired(i64::MAX));
}

#[test]
fn restrict_takes_all_and_gives_back_one_by_one() {
    let options = parsed("restrict,pty");
    assert!(options.pty && !options.port_forwarding && !options.agent_forwarding);
    let options = parsed("no-pty,no-X11-forwarding,No-Agent-Forwarding");
    assert!(!options.pty && options.port_forwarding && !options.agent_forwarding);
    assert_eq!(options.to_string(), "no-pty,no-X11-forwarding,No-Agent-Forwarding");
}

#[test]
fn commands_keep_their_quotes_commas_and_backslashes() {
    let options = parsed(r#"command="echo \"a, b\" \n 'c'",no-pty"#);
    assert_eq!(options.command.as_deref(), Some(r#"echo "a, b" \n 'c'"#));
    assert!(!options.pty);
    assert!(refused(r#"command="a",command="b""#).contains("twice"));
    assert!(refused(r#"command="a"#).contains("closing one"));
    assert!(refused("command").contains("command=\"git-shell\""));
    assert!(refused(r#"command="a"b"#).contains("no option"));
}

#[test]
fn sources_are_addresses_networks_and_patterns() {
    let options = parsed(r#"from="192.0.2.0/24,!192.0.2.7,10.1.*,2001:db8::/32,203.0.113.?""#);
    let allows = |text: &str| options.allows_source(text.parse().unwrap());
    for good in ["192.0.2.1", "10.1.2.3", "2001:db8:1::1", "203.0.113.5", "::ffff:192.0.2.9"] {
        assert!(allows(good), "{good}");
    }
    for bad in ["192.0.2.7", "10.2.0.1", "2001:db9::1", "203.0.113.50", "192.0.3.1"] {
        assert!(!allows(bad), "{bad}");
    }
    // Only exceptions: nobody is let in by one.
    assert!(!parsed(r#"from="!192.0.2.7""#).allows_source([192, 0, 2, 1].into()));
    assert!(parsed(r#"from="0.0.0.0/0""#).allows_source([192, 0, 2, 1].into()));
    for wrong in ["*.example.org", "example.org", "192.0.2.0/33", "192.0.2.1/x", "", "a"] {
        assert!(refused(&format!("from=\"{wrong}\"")).contains("no address"), "{wrong}");
    }
}

#[test]
fn keys_expire() {
    // date -u -d '2027-06-30 12:34:56' +%s
    assert_eq!(parsed(r#"expiry-time="20270630123456""#).expires, Some(1_814_358_896));
    assert_eq!(parsed(r#"expiry-time="20240229Z""#).expires, Some(1_709_164_800));
    let options = parsed(r#"expiry-time="19700102""#);
    assert!(!options.expired(86_399) && options.expired(86_400));
    for wrong in ["", "2027", "20270230", "20271301", "202706302460", "next week", "-1970101"] {
        assert!(refused(&format!("expiry-time=\"{wrong}\"")).contains("YYYYMMDD"), "{wrong}");
    }
}

#[test]
fn what_can_not_be_kept_is_refused() {
    for option in ["verify-required", "cert-authority", "environment=\"A=b\"", "tunnel=\"1\""] {
        assert!(refused(option).contains("can't be kept"), "{option}");
    }
    assert!(refused("restrikt").contains("\"restrikt\" is no option"));
    assert!(refused("pty=\"yes\"").contains("takes no value"));
    assert!(refused(&"pty,".repeat(70)).contains("too long"));
}

#[test]
fn forwards_can_be_bound_to_places() {
    let options =
        parsed(r#"restrict,port-forwarding,permitopen="localhost:5432",permitopen="[::1]:80""#);
    assert!(options.may_open("localhost", 5432) && options.may_open("::1", 80));
    assert!(!options.may_open("localhost", 5433) && !options.may_open_sockets());
    assert!(options.may_listen("localhost", 1) && options.may_listen_on_sockets());
    let options = parsed(r#"permitlisten="8080""#);
    assert!(options.may_listen("localhost", 8080) && options.may_listen("*", 8080));
    assert!(!options.may_listen("localhost", 0) && !options.may_listen_on_sockets());
    assert!(options.may_open("anything", 1) && options.may_open_sockets());
    let options = parsed(r#"permitopen="localhost:5432",no-port-forwarding"#);
    assert!(!options.may_open("localhost", 5432) && !options.may_listen("localhost", 1));
    assert!(refused(r#"permitopen="5432""#).contains("no place"));
    assert!(refused("permitlisten").contains("double quotes"));
}

#[test]
fn the_key_begins_where_the_options_end() {
    for (line, options) in [
        (r#"no-pty ssh-ed25519 AAAA"#, r#"no-pty"#),
        (r#"command="a b",no-pty	ssh-ed25519 AAAA"#, r#"command="a b",no-pty"#),
        (r#"command="say \"a b\"" ssh-ed25519 AAAA"#, r#"command="say \"a b\"""#),
        // Not an escaped backslash: none but a quote can be escaped, so this one goes on.
        (r#"command="a\\" ssh-ed25519" AAAA"#, r#"command="a\\" ssh-ed25519""#),
        (r#"command="open ssh-ed25519 AAAA"#, r#"command="open ssh-ed25519 AAAA"#),
    ] {
        assert_eq!(&line[..end_of_options(line)], options);
    }
    assert!(refused("command=\"a\u{1b}[2J\"").contains("control character"));
    assert!(refused(r#"command=" ""#).contains("needs a value"));
}

proptest! {
    #[test]
    fn anything_is_parsed_or_refused(text in "\\PC{0,60}") {
        let _ = KeyOptions::parse(&text);
        prop_assert!(end_of_options(&text) <= text.len());
    }

    #[test]
    fn what_was_taken_is_taken_again(
        command in "[!-~][ -~]{0,30}", pty: bool, restrict: bool,
    ) {
        let mut text = format!("command=\"{}\"", command.replace('"', "\\\""));
        if restrict { text.push_str(",restrict"); }
        if pty { text.push_str(",pty"); }
        // A backslash before a quote of ours would make another text of it.
        prop_assume!(!command.contains('\\'));
        let options = KeyOptions::parse(&text).unwrap();
        prop_assert_eq!(options.command.as_deref(), Some(command.as_str()));
        prop_assert_eq!(options.pty, pty || !restrict);
        prop_assert_eq!(KeyOptions::parse(&options.to_string()).unwrap(), options);
    }
}
