//! The documents that are installed: their links lead somewhere, and they name what the programs are linked with.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vdi_tests::pages::links;
use vdi_tests::server::binary;

use super::{run, unpack};

/// The package, unpacked.
struct Unpacked {
    place: TempDir,
}

impl Unpacked {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        unpack(place.path());
        Self { place }
    }

    fn documents(&self) -> PathBuf {
        self.place.path().join("usr/share/doc/vdi-vhost")
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.documents().join(name)).unwrap()
    }
}

/// All files below.
fn files(below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn every_link_of_the_installed_documents_leads_to_one_that_is_installed() {
    let unpacked = Unpacked::new();
    let documents = fs::canonicalize(unpacked.documents()).unwrap();
    let pages = files(&documents);
    let pages = pages
        .iter()
        .filter(|path| path.extension().is_some_and(|of| of == "md"));
    let mut found = 0;
    for page in pages {
        for target in links(&fs::read_to_string(page).unwrap()) {
            let led = page.parent().unwrap().join(target);
            let led = led
                .canonicalize()
                .unwrap_or_else(|error| panic!("{}: {target}: {error}", page.display()));
            assert!(led.starts_with(&documents), "{}: {target}", page.display());
            found += 1;
        }
    }
    assert!(found > 10, "{found}");
}

/// The crates of which a program has code, as its debug information names their sources.
fn compiled_in(program: &str) -> BTreeSet<String> {
    let program = fs::read(binary(program)).unwrap();
    let text = String::from_utf8_lossy(&program);
    let paths = text.split("/registry/src/").skip(1);
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    let name = |path: &str| {
        let (_, name) = path.split_once('/')?;
        let end = name.find(|c| !is_of_name(c)).unwrap_or(name.len());
        Some(name[..end].to_owned())
    };
    paths.filter_map(name).collect()
}

#[test]
fn the_copyright_file_names_every_crate_that_a_program_has_code_of() {
    let unpacked = Unpacked::new();
    let copyright = unpacked.text("copyright");
    let named = copyright
        .lines()
        .filter_map(|line| line.strip_prefix("Files: "));
    let named: BTreeSet<_> = named.flat_map(|files| files.split(' ')).collect();
    let linked: BTreeSet<_> = ["vdi-vhost", "vdi"]
        .iter()
        .flat_map(|name| compiled_in(name))
        .collect();
    assert!(linked.len() > 30, "{linked:?}");
    for name in &linked {
        assert!(named.contains(&*format!("{name}/*")), "{name} is not named");
    }
    // What only runs while others are compiled is not in the programs.
    assert!(!copyright.contains("thiserror-impl"));
}

#[test]
fn every_crate_that_is_named_has_its_license_and_the_texts_that_come_with_it() {
    let unpacked = Unpacked::new();
    let notices = unpacked.documents().join("third-party-notices.gz");
    let notices = run("zcat", &[notices.to_str().unwrap()]);
    let (list, texts) = notices.split_once("\n---- [1]\n").unwrap();
    let texts: Vec<&str> = texts.split("\n---- [").collect();
    let crates: BTreeMap<_, _> = list
        .lines()
        .filter_map(|line| line.split_once(": "))
        .collect();
    let copyright = unpacked.text("copyright");
    let mut without = Vec::new();
    for line in copyright
        .lines()
        .filter_map(|line| line.strip_prefix("Files: "))
    {
        for name in line.split(' ').filter_map(|files| files.strip_suffix("/*")) {
            let described = crates
                .get(name)
                .unwrap_or_else(|| panic!("no notices of {name}"));
            let (license, rest) = described.split_once(", ").unwrap();
            // What `ci/notices` says of those that name none.
            assert_ne!(license, "see its files", "{name}");
            let numbers: Vec<usize> = rest
                .split('[')
                .skip(1)
                .map(|number| number.trim_end().trim_end_matches(']').parse().unwrap())
                .collect();
            assert!(
                numbers.iter().all(|number| texts[number - 1].len() > 100),
                "{name}"
            );
            if numbers.is_empty() {
                without.push((name, license));
            }
        }
    }
    // Apache's asks for none, and every system has it.
    assert!(
        without
            .iter()
            .all(|(_, license)| license.contains("Apache-2.0")),
        "{without:?}"
    );
}
