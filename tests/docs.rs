//! The pages in `docs` stay true: what they quote is what the programs say.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

use std::fs;
use std::path::{Path, PathBuf};

use vdi_tests::pages::links;

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The text of all sources below, with strings that go on in the next line joined.
fn sources(below: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text += &fs::read_to_string(&path).unwrap();
        }
    }
    let mut pieces = text.split("\\\n");
    let first = pieces.next().unwrap().to_owned();
    pieces.fold(first, |joined, piece| joined + piece.trim_start())
}

#[test]
fn every_message_in_the_troubleshooting_page_is_one_that_is_said() {
    let page = fs::read_to_string(top().join("docs/troubleshooting.md")).unwrap();
    let said: String = ["vdi-core", "vdi-vhost", "vdi-cli"]
        .map(|name| sources(&top().join("crates").join(name).join("src")))
        .concat();
    let quoted: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
        .collect();
    assert!(quoted.len() > 15, "{quoted:?}");
    for message in quoted {
        assert!(said.contains(message), "nobody says {message:?}");
    }
}

#[test]
fn every_link_leads_somewhere() {
    let mut found = 0;
    for page in [
        "README.md",
        "docs/daemon.md",
        "docs/troubleshooting.md",
        "docs/fleet.md",
        "docs/performance.md",
        "docs/hostile.md",
    ] {
        let path = top().join(page);
        for target in links(&fs::read_to_string(&path).unwrap()) {
            assert!(
                path.parent().unwrap().join(target).exists(),
                "{page} links to {target}"
            );
            found += 1;
        }
    }
    assert!(found > 3, "{found}");
}

#[test]
fn every_test_that_the_page_of_hostile_cases_names_is_there() {
    let page = fs::read_to_string(top().join("docs/hostile.md")).unwrap();
    let tests = sources(&top().join("tests")) + &sources(&top().join("crates/vdi-vhost/src"));
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let mut found = 0;
    for row in rows.filter(|row| !row.starts_with("| case") && !row.starts_with("| ---")) {
        let named: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        let names = named
            .iter()
            .filter(|word| word.contains('_') && **word != "O_DIRECT");
        let before = found;
        for name in names {
            let declared = tests.split(&format!("fn {name}()")).next().unwrap();
            assert!(declared.len() < tests.len(), "there is no test {name}");
            assert!(
                declared.trim_end().ends_with("#[test]"),
                "{name} is no test"
            );
            found += 1;
        }
        assert!(found > before, "no test is named: {row}");
    }
    assert!(found > 60, "{found}");
}
