use crate::host::{Host, IMAGE_ID};
use hermitage_storage::base::{Base, BaseId};
use serde_json::{Value, json};
use std::fs;

#[test]
fn a_base_is_built_and_chosen() {
    let host = Host::new();
    host.run(&["base", "build"]).fails(1, "hermitage image build");
    // Somebody had an account before there was a base.
    host.run(&["account", "add", "early", "--disk", "1M"]).success();
    let id = host.install_vmm(1);
    let image = host.image().display().to_string();
    let built = host.json(&["base", "build", "--image", &image]);
    assert_eq!(built["id"], id.as_str());
    assert_eq!(built["disks_made"], 1);
    let early = host.accounts().named("early").unwrap();
    assert_eq!(fs::metadata(host.state().disk(early.id)).unwrap().len(), 1 << 20);

    assert_eq!(host.state().current_base().unwrap(), Some(id.clone()));
    let listed = host.json(&["base", "list"]);
    assert_eq!(listed["current"], id.as_str());
    assert_eq!(listed["bases"][0]["current"], true);
    assert_eq!(listed["bases"][0]["memory_bytes"], 1 << 20);
    assert_eq!(host.json(&["image", "list"])["images"][0]["id"], IMAGE_ID);

    // Again, from the image that is in the state directory now; the same content is the same base.
    assert_eq!(host.json(&["base", "build"])["id"], id.as_str());
    let left = fs::read_dir(host.state().bases_dir()).unwrap().count();
    assert_eq!(left, 1, "nothing is left beside");
}

#[test]
fn another_base_can_be_used_and_the_former_deleted() {
    let host = Host::new();
    let image = host.image().display().to_string();
    let first = host.install_vmm(1);
    host.run(&["base", "build", "--image", &image]).success();
    let second = host.install_vmm(2);
    host.run(&["base", "build"]).success();
    assert_ne!(first, second);
    assert_eq!(host.state().current_base().unwrap(), Some(second.clone()));

    host.run(&["base", "remove", second.as_str()]).fails(1, "current");
    host.run(&["base", "use", &first.as_str()[..8]]).success();
    assert_eq!(host.state().current_base().unwrap(), Some(first.clone()));
    host.run(&["base", "remove", second.as_str()]).success();
    host.run(&["base", "use", second.as_str()]).fails(3, "no base");
    host.run(&["base", "use", ""]).fails(3, "no base");
}

#[test]
fn bases_that_nothing_needs_are_deleted() {
    let host = Host::new();
    let image = host.image().display().to_string();
    let mut ids = vec![];
    for memory in 1..=4 {
        ids.push(host.install_vmm(memory));
        host.run(&["base", "build", "--image", &image]).success();
    }
    let [saved, running, unneeded, current] = &ids[..] else { panic!("four bases") };
    host.run(&["account", "add", "alice", "--disk", "1M"]).success();
    let alice = host.accounts().named("alice").unwrap().id;
    host.save_on("alice", saved);
    let machine = Base::open(&host.state().base(running)).unwrap();

    let listed = host.json(&["base", "list"]);
    let of = |id: &BaseId| {
        let bases = listed["bases"].as_array().unwrap();
        bases.iter().find(|base| base["id"] == id.as_str()).unwrap().clone()
    };
    assert_eq!(of(saved)["saved_machines"], 1);
    assert_eq!(of(current)["saved_machines"], 0);

    let planned = host.json(&["base", "gc", "--dry-run"]);
    assert_eq!(planned["removed"][0]["id"], unneeded.as_str());
    assert_eq!(planned["removed"].as_array().unwrap().len(), 1);
    let kept: Vec<_> = planned["kept"].as_array().unwrap().iter().map(|k| &k["why"]).collect();
    assert!(kept.iter().any(|why| why.as_str().unwrap().contains("alice's saved machine")));
    assert!(kept.iter().any(|why| *why == "machines run on it"), "{kept:?}");
    assert!(host.state().base(unneeded).exists(), "--dry-run deletes nothing");
    assert_eq!(host.json(&["base", "gc", "--keep", "1"])["removed"], json!([]));

    host.run(&["base", "remove", saved.as_str()]).fails(1, "snapshot drop alice");
    host.run(&["base", "remove", running.as_str()]).fails(1, "machines run on it");
    host.run(&["base", "gc"]).success();
    assert!(!host.state().base(unneeded).exists());

    // What is saved but does not fit its disk any more needs nothing.
    drop(machine);
    hermitage_storage::saved::consume(&host.state(), alice).unwrap();
    // Another test's child may have a copy of that machine's lock for a moment.
    let unneeded = || host.json(&["base", "gc", "--dry-run"])["removed"].as_array().unwrap().len();
    for _ in 0..100 {
        if unneeded() == 2 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let gone = host.json(&["base", "gc"]);
    assert_eq!(gone["removed"].as_array().unwrap().len(), 2);
    assert!(host.state().base(current).exists());
    host.run(&["base", "gc"]).success();
}

#[test]
fn a_damaged_base_is_not_chosen() {
    let host = Host::new();
    let image = host.image().display().to_string();
    let id = host.install_vmm(1);
    host.run(&["base", "build", "--image", &image]).success();
    let state = host.state().base(&id).join("state.bin");
    fs::remove_file(&state).unwrap();
    fs::write(&state, b"stale").unwrap();
    host.run(&["base", "use", id.as_str()]).fails(1, "state.bin: it was altered");
    host.run(&["doctor"]).fails_saying("state.bin");
}

#[test]
fn a_failed_build_leaves_nothing() {
    let host = Host::new();
    let image = host.image().display().to_string();
    host.install("hermitage-vmm", "mkdir \"$5\"; echo 'KVM is not real' >&2; exit 1\n");
    host.run(&["base", "build", "--image", &image]).fails(1, "KVM is not real");
    assert_eq!(host.state().current_base().unwrap(), None);
    host.install_vmm(1);
    host.run(&["base", "build"]).success();
    assert_eq!(fs::read_dir(host.state().bases_dir()).unwrap().count(), 1, "swept up");
}

#[test]
fn a_damaged_image_is_not_kept() {
    let host = Host::new();
    host.install("hermitage-vmm", "exit 1\n");
    let image = host.image();
    let template = fs::read(image.join("disk-template.img")).unwrap();
    fs::write(image.join("disk-template.img"), template.to_ascii_uppercase()).unwrap();
    let image = image.display().to_string();
    host.run(&["base", "build", "--image", &image]).fails(1, "disk-template.img: it was altered");
    assert_eq!(fs::read_dir(host.state().images_dir()).unwrap().count(), 0);

    fs::write(host.image().join("disk-template.img"), template).unwrap();
    host.install_vmm(1);
    host.run(&["base", "build", "--image", &image]).success();
}

#[test]
fn an_image_is_built_into_the_state_directory() {
    let host = Host::new();
    host.run(&["image", "build"]).fails(1, "hermitage-image");
    host.install(
        "hermitage-image",
        &format!(
            "[ \"$1 $2 $4\" = 'build --out --agent' ]; cp -r {} \"$3\"; echo id\n",
            host.image().display()
        ),
    );
    assert_eq!(host.json(&["image", "build"])["id"], IMAGE_ID);
    assert_eq!(host.json(&["image", "build"])["id"], IMAGE_ID);
    assert_eq!(fs::read_dir(host.state().images_dir()).unwrap().count(), 1);

    host.install_vmm(1);
    host.run(&["base", "build"]).success();
    host.run(&["image", "remove", IMAGE_ID]).fails(1, "current base");
    fs::remove_file(host.state().root().join("current-base")).unwrap();
    host.run(&["image", "remove", IMAGE_ID]).success();
    host.run(&["image", "remove", IMAGE_ID]).fails(3, "no image");
    host.run(&["image", "remove", "../bases"]).fails(3, "no image");
}

#[test]
fn the_doctor_names_what_is_missing() {
    let host = Host::new();
    let finding = |name: &str| -> Value {
        let done = host.run(&["doctor", "--json"]);
        let report: Value = serde_json::from_str(&done.out).unwrap();
        assert_eq!(done.code == 0, report["healthy"] == json!(true));
        let findings = report["findings"].as_array().unwrap().clone();
        for finding in &findings {
            let fine = finding["level"] == "ok";
            assert!(fine || finding["advice"] != "", "what is to be done? {finding}");
        }
        findings.into_iter().find(|finding| finding["check"] == name).unwrap_or(Value::Null)
    };
    assert_eq!(finding("programs")["level"], "failure");
    assert_eq!(finding("state directory")["level"], "warning");
    assert!(!host.state().root().exists(), "looking changes nothing");

    host.run(&["account", "add", "alice", "--disk", "1M"]).success();
    assert_eq!(finding("base")["level"], "failure");
    assert_eq!(finding("disks")["level"], "warning");
    assert_eq!(finding("accounts")["level"], "ok");
    assert_eq!(finding("service")["level"], "warning");

    host.install_vmm(1);
    host.run(&["base", "build", "--image", &host.image().display().to_string()]).success();
    for check in ["base", "base fits host", "image"] {
        assert_eq!(finding(check)["level"], "ok", "{check}");
    }
    assert_eq!(finding("disks"), Value::Null);
    // A probe guest that dies is a host without KVM, whatever else is there.
    if finding("kvm device")["level"] == "ok" {
        host.install("hermitage-vmm", "echo 'emulation failure' >&2; exit 1\n");
        assert_eq!(finding("probe guest")["found"], "emulation failure");
        host.install("hermitage-vmm", "exit 0\n");
        assert_eq!(finding("probe guest")["level"], "ok");
    }
    fs::write(host.state().database(), "no database").unwrap();
    assert_eq!(finding("accounts")["level"], "failure");
}
