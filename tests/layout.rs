//! What `info` and `map` say and draw of a disk's layout: fragmentation, which image shows, and pictures.
//!
//! Numbers are compared with a count of the map's bytes here, pictures with layouts that are known.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use roxmltree::{Document, Node};
use serde_json::{Value, json};
use tempfile::TempDir;
use vdi_tests::builder::{FREE, ZERO, image};
use vdi_tests::corpus::corpus;
use vdi_tests::image::write_to;
use vdi_tests::random::Random;
use vdi_tests::tool::{Answer, program, spawn, vdi};
use vdi_tests::words;

const MIB: u64 = 1 << 20;

/// VirtualBox's chain of four, the leaf first: of each MiB it is known where it comes from.
fn chain() -> (TempDir, Vec<PathBuf>) {
    let directory = tempfile::tempdir().unwrap();
    let case = corpus().into_iter().find(|case| case.name == "chain-4");
    let images = case.unwrap().images;
    let mut paths: Vec<_> = images
        .iter()
        .map(|image| image.unpack(directory.path()))
        .collect();
    paths.reverse();
    (directory, paths)
}

/// The classes of the bars of [`chain`], by MiB: d1 base d1 d3 d3 d1 zeros d3 d3.
const CHAIN_BARS: [&str; 9] = ["i2", "i3", "i2", "i0", "i0", "i2", "zero", "i0", "i0"];

fn data(path: &Path) -> Value {
    let info = vdi(words!["info", "--json", path]).expect_code(0).json();
    info["format-specific"]["data"].clone()
}

/// The map as its bytes are: what says how it must be counted.
fn entries(path: &Path) -> Vec<u32> {
    let file = File::open(path).unwrap();
    let word = |at| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at).unwrap();
        u32::from_le_bytes(bytes)
    };
    let (map, blocks) = (u64::from(word(0x154)), u64::from(word(0x180)));
    (0..blocks).map(|nth| word(map + 4 * nth)).collect()
}

fn run(words: &[&OsStr], env: &[(&str, &str)]) -> Answer {
    let mut command = Command::new(program("vdi"));
    for name in [
        "NO_COLOR",
        "CLICOLOR_FORCE",
        "LC_ALL",
        "LC_CTYPE",
        "LANG",
        "CI",
    ] {
        command.env_remove(name);
    }
    command
        .args(words)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = spawn(&mut command).wait_with_output().unwrap();
    Answer {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn picture(path: &Path) -> String {
    let out = path.with_extension("svg");
    let answer = vdi(words!["map", "--svg", out, "--force", path]).expect_code(0);
    assert_eq!((answer.out.as_str(), answer.err.as_str()), ("", ""));
    fs::read_to_string(out).unwrap()
}

fn number(node: Node<'_, '_>, name: &str) -> f64 {
    node.attribute(name).unwrap().parse().unwrap()
}

/// The bars of a strip whose track begins at `y`: class, x and height, from left to right.
fn bars(document: &Document<'_>, track: Node<'_, '_>) -> Vec<(String, f64, f64)> {
    let (top, height) = (number(track, "y"), number(track, "height"));
    let rects = document.descendants().filter(|n| n.has_tag_name("rect"));
    rects
        .filter(|rect| *rect != track && rect.parent().is_some_and(|up| up.has_tag_name("g")))
        .filter(|rect| (top..top + height).contains(&number(*rect, "y")))
        .map(|rect| {
            let class = rect.attribute("class").unwrap_or("ramp").to_owned();
            (class, number(rect, "x"), number(rect, "height"))
        })
        .collect()
}

fn tracks<'a, 'i>(document: &'a Document<'i>) -> Vec<Node<'a, 'i>> {
    let nodes = document.descendants();
    // The one in the legend is small.
    nodes
        .filter(|n| n.attribute("class") == Some("track") && number(*n, "width") > 100.0)
        .collect()
}

fn texts<'a>(document: &'a Document<'_>, tag: &str) -> Vec<&'a str> {
    let nodes = document.descendants().filter(|n| n.has_tag_name(tag));
    nodes.filter_map(|node| node.text()).collect()
}

#[test]
fn info_counts_runs_holes_and_the_tail_as_the_map_has_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vdi");
    let mut random = Random::printed();
    for _ in 0..20 {
        let (blocks, room) = (random.within(1..40), random.within(0..5));
        let in_file = blocks + room;
        let mut free: Vec<u64> = (0..in_file).collect();
        let mut built = image().with_blocks(u32::try_from(in_file).unwrap());
        let mut next = 0;
        let mut kept = Vec::new();
        for block in 0..usize::try_from(in_file).unwrap() {
            // Mostly in order, so that there are runs of every length.
            let entry = match random.within(0..5) {
                0 => FREE,
                1 => ZERO,
                2 => {
                    let nth = random.within(0..free.len() as u64);
                    u32::try_from(free.remove(usize::try_from(nth).unwrap())).unwrap()
                }
                _ => match free.iter().position(|&place| place >= next) {
                    Some(nth) => u32::try_from(free.remove(nth)).unwrap(),
                    None => FREE,
                },
            };
            if entry < ZERO {
                next = u64::from(entry) + 1;
                kept.push(entry);
            }
            built = built.with_entry(block, entry);
        }
        // The builder's file has three blocks.
        let more = in_file.cast_signed() - 3;
        built.with_len_change(more << 20).write(&path);
        let len = fs::metadata(&path).unwrap().len();
        let found = data(&path);
        let start = found["header"]["offset-data"].as_u64().unwrap();
        let size = found["header"]["block-size"].as_u64().unwrap();
        let runs = kept.windows(2).filter(|pair| pair[1] != pair[0] + 1);
        let runs = runs.count() + usize::from(!kept.is_empty());
        let end = kept.iter().max().map_or(0, |&last| u64::from(last) + 1);
        let fragmented = runs.saturating_sub(1);
        let expected = json!({
            "runs": runs,
            "fragmented-clusters": fragmented,
            "fragmented-percent": found["fragmentation"]["fragmented-percent"],
            "holes": end - kept.len() as u64,
            "tail": (len - start).div_ceil(size) - end,
            "away": 0,
        });
        assert_eq!(found["fragmentation"], expected, "{:?}", entries(&path));
        assert_eq!(
            kept,
            entries(&path)
                .into_iter()
                .filter(|&entry| entry < ZERO)
                .collect::<Vec<_>>()
        );
        let percent = found["fragmentation"]["fragmented-percent"]
            .as_f64()
            .unwrap();
        let exact = fragmented as f64 * 100.0 / (kept.len().max(1)) as f64;
        assert!((percent - exact).abs() < 0.006, "{percent} is not {exact}");
        let people = vdi(words!["info", path]).expect_code(0).out;
        let line = people.lines().find(|line| line.starts_with("fragment"));
        assert!(line.unwrap().contains(&format!("({runs} run")), "{people}");
    }
}

#[test]
fn info_says_what_shows_of_each_image_of_a_chain() {
    let (_directory, chain) = chain();
    let list = vdi(words!["info", "--json", "--backing-chain", chain[0]]);
    let list = list.expect_code(0).json();
    let map = vdi(words!["map", "--json", chain[0]]).expect_code(0).json();
    let shown = |depth: usize| list[depth]["format-specific"]["data"]["shown"].clone();
    for depth in 0..4 {
        let sum = |key: &str| -> u64 {
            let of = map.as_array().unwrap().iter().filter(|extent| {
                extent["depth"] == depth && extent["present"] == true && extent[key] == true
            });
            of.map(|extent| extent["length"].as_u64().unwrap()).sum()
        };
        let expected = json!({"data": sum("data"), "zero": sum("zero")});
        assert_eq!(shown(depth), expected, "{depth}");
    }
    assert_eq!(shown(0), json!({"data": 4 * MIB, "zero": 0}));
    assert_eq!(shown(1), json!({"data": 0, "zero": MIB}));
    let people = vdi(words!["info", "--backing-chain", chain[0]]).expect_code(0);
    assert!(people.out.contains("shows:         3 MiB of data"));
    assert_eq!(
        data(&chain[0])["shown"],
        Value::Null,
        "alone it hides nothing"
    );
}

#[test]
fn a_picture_has_a_bar_for_each_block_in_the_colour_of_its_image() {
    let (_directory, chain) = chain();
    let svg = picture(&chain[0]);
    let document = Document::parse(&svg).unwrap();
    let tracks = tracks(&document);
    assert_eq!(tracks.len(), 1 + 2 * 4, "the disk, and two strips an image");
    let disk = bars(&document, tracks[0]);
    let classes: Vec<_> = disk.iter().map(|(class, ..)| class.as_str()).collect();
    assert_eq!(classes, CHAIN_BARS);
    for (nth, (_, x, height)) in (0_u8..).zip(&disk) {
        let expected = 30.0 + 940.0 * f64::from(nth) / 9.0;
        assert!((x - expected).abs() < 1.0, "{x} is not {expected}");
        assert!((height - 56.0).abs() < 0.1, "the whole cell has data");
    }
    // The base has all but zeros at 3 and 6, and only 1 is not hidden.
    let base: Vec<_> = bars(&document, tracks[7]);
    let classes: Vec<_> = base.iter().map(|(class, ..)| class.as_str()).collect();
    let (data, zero) = ("i3 hid", "zero hid");
    let expected = [data, "i3", data, zero, data, data, zero, data, data];
    assert_eq!(classes, expected);
    // Its file: header and map, and seven blocks.
    let file: Vec<_> = bars(&document, tracks[8]);
    assert_eq!(file.len(), 8);
    assert_eq!(file[0].0, "meta");
    let texts = texts(&document, "text");
    for text in ["d3.vdi", "base.vdi", "9 MiB", "The disk"] {
        assert!(texts.contains(&text), "{text}: {texts:?}");
    }
    assert!(svg.contains("4 blocks, 75.0 % fragmented"), "{svg}");
    assert!(svg.contains("0fd8a61f-6c53-4c65-abfe-3d985bd1f7b8"));
}

#[test]
fn tooltips_say_what_a_cell_has() {
    let (_directory, chain) = chain();
    let svg = picture(&chain[0]);
    let document = Document::parse(&svg).unwrap();
    let tips = texts(&document, "title");
    for tip in [
        "1 MiB to 2 MiB\n1 MiB from base.vdi",
        "6 MiB to 7 MiB\n1 MiB of zeros without storage",
        "header and map: 0 B to 2 MiB",
        // d3's first block in its file is the disk's eighth.
        "2 MiB to 3 MiB of the file\n1 of 1 blocks in use, 1 runs begin here\nfirst from 7 MiB to 8 MiB of the disk",
    ] {
        assert!(tips.contains(&tip), "{tip}: {tips:?}");
    }
}

#[test]
fn links_and_colours_follow_the_order_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vdi");
    let blocks = [2, 0, 3, 1];
    let mut built = image().with_blocks(4);
    for (block, entry) in blocks.into_iter().enumerate() {
        built = built.with_entry(block, entry);
    }
    // The builder's file has three blocks.
    built.with_len_change(1 << 20).write(&path);
    let svg = picture(&path);
    let document = Document::parse(&svg).unwrap();
    let links = document
        .descendants()
        .filter(|n| n.attribute("class") == Some("link"));
    let colour = |node: Node<'_, '_>| node.attribute("fill").unwrap().to_owned();
    let by_disk: Vec<_> = links.map(colour).collect();
    assert_eq!(by_disk.len(), 4);
    assert_eq!(by_disk[0], "#5e3c99", "the ramp begins at the disk's start");
    let file_strip = tracks(&document)[1];
    let top = number(file_strip, "y");
    let by_file: Vec<_> = document
        .descendants()
        .filter(|n| n.has_tag_name("rect") && n.attribute("fill").is_some())
        .filter(|n| n.attribute("y") == Some(&top.to_string()))
        .map(colour)
        .collect();
    assert_eq!(by_file.len(), 4);
    for (block, entry) in blocks.into_iter().enumerate() {
        let place = usize::try_from(entry).unwrap();
        assert_eq!(by_file[place], by_disk[block], "{block}");
    }
}

#[test]
fn pictures_of_huge_disks_and_long_chains_stay_small() {
    let directory = tempfile::tempdir().unwrap();
    let name = |nth: u32| directory.path().join(format!("{nth}.vdi"));
    vdi(words!["create", "--block-size", "128M", name(0), "64T"]).expect_code(0);
    let mut random = Random::printed();
    for nth in 0..8 {
        // No two in one block.
        let at = (u64::from(nth) * (8 << 20) + random.within(0..8 << 20)) * MIB;
        write_to(&name(nth), at, &[7; 512]);
        if nth < 7 {
            vdi(words![
                "snapshot",
                "--block-size",
                "128M",
                name(nth),
                name(nth + 1)
            ])
            .expect_code(0);
        }
    }
    let svg = picture(&name(7));
    assert!(svg.len() < 300_000, "{}", svg.len());
    let document = Document::parse(&svg).unwrap();
    assert!(texts(&document, "text").contains(&"3 older images"));
    // The five youngest have a file each; what the others have together has none.
    assert_eq!(tracks(&document).len(), 1 + 2 * 5 + 1);
    let strip = vdi(words!["map", "--strip", name(7)]).expect_code(0).out;
    assert!(strip.lines().count() < 40, "{strip}");
    assert!(strip.contains("3 older images"), "{strip}");
}

/// Eight million blocks, each a run of its own: 32 MiB of map. Twice that is all the address space that there is, program
/// and stacks among it.
#[test]
fn a_look_at_a_huge_image_takes_little_more_memory_than_its_map() {
    const BLOCKS: u32 = 8 << 20;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vdi");
    let svg = directory.path().join("a.svg");
    vdi(words!["create", path, "8T"]).expect_code(0);
    let entries: Vec<u8> = (0..BLOCKS)
        .flat_map(|block| (block ^ 1).to_le_bytes())
        .collect();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&entries, MIB).unwrap();
    file.write_all_at(&BLOCKS.to_le_bytes(), 0x184).unwrap();
    let data = MIB + 4 * u64::from(BLOCKS);
    file.set_len(data + u64::from(BLOCKS) * MIB).unwrap();
    for words in [
        words!["info", path].to_vec(),
        words!["check", path].to_vec(),
        words!["map", "--strip", path].to_vec(),
        words!["map", "--svg", svg, path].to_vec(),
    ] {
        let mut shell = Command::new("bash");
        let limited = format!("ulimit -v {}; exec \"$@\"", 64 << 10);
        let done = shell
            .args(["-c", &limited, "bash"])
            .arg(program("vdi"))
            .args(&words)
            .output()
            .unwrap();
        assert!(done.status.success(), "{words:?}: {done:?}");
    }
}

#[test]
fn a_picture_of_many_scattered_blocks_stays_small() {
    const BLOCKS: u64 = 100_003;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vdi");
    vdi(words![
        "create",
        "--block-size",
        "128k",
        path,
        format!("{}k", BLOCKS * 128)
    ])
    .expect_code(0);
    let header = data(&path)["header"].clone();
    let [map, start] = ["offset-bmap", "offset-data"].map(|key| header[key].as_u64().unwrap());
    let file = File::options().write(true).open(&path).unwrap();
    // Every block elsewhere: 7919 has no common divisor with a prime.
    let entries: Vec<u8> = (0..BLOCKS)
        .flat_map(|block| u32::try_from(block * 7919 % BLOCKS).unwrap().to_le_bytes())
        .collect();
    file.write_all_at(&entries, map).unwrap();
    file.write_all_at(&u32::try_from(BLOCKS).unwrap().to_le_bytes(), 0x184)
        .unwrap();
    file.set_len(start + BLOCKS * (128 << 10)).unwrap();
    drop(file);
    let svg = picture(&path);
    assert!(svg.len() < 150_000, "{}", svg.len());
    let document = Document::parse(&svg).unwrap();
    let elements = document.descendants().filter(Node::is_element).count();
    assert!(elements < 2000, "{elements}");
    assert_eq!(data(&path)["fragmentation"]["runs"], BLOCKS);
}

#[test]
fn an_empty_disk_is_drawn_empty() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vdi");
    vdi(words!["create", path, "1G"]).expect_code(0);
    let svg = picture(&path);
    let document = Document::parse(&svg).unwrap();
    let tracks = tracks(&document);
    assert_eq!(tracks.len(), 2);
    assert_eq!(bars(&document, tracks[0]), []);
    assert_eq!(bars(&document, tracks[1]).len(), 1, "header and map");
    let strip = vdi(words!["map", "--strip", path]).expect_code(0).out;
    assert!(strip.contains("blocks: 0 used, 0 unused"), "{strip}");
}

#[test]
fn hostile_names_stay_text_in_pictures_and_steer_no_terminal() {
    const NAME: &str = "<script>alert('&\"')</script>\u{1b}[31m\u{202e}\n.vdi";
    let (directory, chain) = chain();
    let [top, base] = [0, 3].map(|nth: usize| {
        directory
            .path()
            .join(format!("{nth}{NAME}").replace('/', ""))
    });
    fs::rename(&chain[0], &top).unwrap();
    fs::rename(&chain[3], &base).unwrap();
    let out = directory.path().join("out.svg");
    vdi(words!["map", "--svg", out, top]).expect_code(0);
    let svg = fs::read_to_string(out).unwrap();
    let document = Document::parse(&svg).unwrap();
    assert!(!document.descendants().any(|n| n.has_tag_name("script")));
    let shown = "3<script>alert('&\"')<script>\\u{1b}[31m\\u{202e}\\u{a}.vdi";
    let texts = texts(&document, "text");
    assert!(texts.contains(&shown), "{texts:?}");
    for words in [
        words!["map", top].as_slice(),
        &words!["map", "--strip", top],
        &words!["info", "--backing-chain", top],
    ] {
        let out = vdi(words).expect_code(0).out;
        assert!(out.contains("<script>alert"), "{out}");
        assert!(!out.contains(['\u{1b}', '\u{202e}']), "{out:?}");
    }
}

#[test]
fn a_picture_replaces_only_what_it_may_and_never_an_image() {
    let (directory, chain) = chain();
    let out = directory.path().join("out.svg");
    fs::write(&out, "mine").unwrap();
    let answer = vdi(words!["map", "--svg", out, chain[0]]).expect_code(1);
    assert!(answer.err.contains("--force"), "{answer:#?}");
    assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
    vdi(words!["map", "--svg", out, "--force", chain[0]]).expect_code(0);
    assert!(fs::read_to_string(&out).unwrap().starts_with("<svg"));
    for image in &chain {
        let before = fs::read(image).unwrap();
        let answer = vdi(words!["map", "-U", "--svg", image, "--force", chain[0]]);
        assert!(answer.expect_code(1).err.contains("are the same file"));
        assert!(fs::read(image).unwrap() == before);
    }
    for other in ["--json", "--strip"] {
        vdi(words!["map", other, "--svg", out, chain[0]]).expect_code(1);
    }
    let names = fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(names, 5, "nothing else is left");
}

#[test]
fn a_strip_without_colours_has_digits_for_images_and_places() {
    let (_directory, chain) = chain();
    let words = words!["map", "--strip", chain[0]];
    let plain = run(&words, &[("LC_ALL", "C")]).expect_code(0).out;
    assert!(plain.is_ascii(), "{plain}");
    let lines: Vec<_> = plain.lines().collect();
    let cells = |line: &str| {
        let of: Vec<char> = line.split('|').nth(1).unwrap().chars().collect();
        let firsts = of.chunks(7).map(|cell| cell[0]);
        firsts.collect::<String>()
    };
    assert_eq!(cells(lines[1]), "######.##", "{plain}");
    assert_eq!(cells(lines[2]), "232002100", "{plain}");
    // d3 keeps the disk's blocks 7, 3, 8 and 4 in this order, of nine.
    let file = plain
        .lines()
        .skip_while(|line| !line.starts_with("d3.vdi: file"));
    let file = file.clone().nth(1).unwrap();
    let places: String = file
        .split('|')
        .nth(1)
        .unwrap()
        .chars()
        .step_by(16)
        .collect();
    assert_eq!(places, "7384", "{plain}");
    let unicode = run(&words, &[("LANG", "en_US.UTF-8")]).expect_code(0).out;
    assert!(
        unicode.contains("██") && unicode.contains("··"),
        "{unicode}"
    );
    assert!(!unicode.contains('\u{1b}'), "{unicode}");
}

#[test]
fn a_strip_has_colours_where_they_are_wanted_and_a_pipe_has_neither() {
    let (_directory, chain) = chain();
    let words = words!["map", "--strip", chain[0]];
    let coloured = run(&words, &[("CLICOLOR_FORCE", "1")]).expect_code(0).out;
    let disk = coloured.lines().nth(1).unwrap();
    let colours: Vec<_> = disk
        .split("\x1b[38;5;")
        .skip(1)
        .map(|part| part.split('m').next().unwrap())
        .collect();
    let expected = ["36", "175", "36", "32", "32", "36", "245", "32", "32"];
    assert_eq!(colours, expected, "{disk}");
    let both = [("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")];
    let plain = run(&words, &both).expect_code(0).out;
    assert!(!plain.contains('\u{1b}'), "{plain}");
    let table = run(&words!["map", chain[0]], &[]).expect_code(0).out;
    assert_eq!(
        table.lines().count(),
        10,
        "a title and nine ranges: {table}"
    );
}

#[test]
fn a_terminal_gets_the_drawing_below_the_table() {
    let (_directory, chain) = chain();
    let mut script = Command::new("script");
    let command = format!(
        "'{}' map '{}'",
        program("vdi").display(),
        chain[0].display()
    );
    script
        .args(["-qec", &command, "/dev/null"])
        .env_remove("NO_COLOR")
        .envs([("TERM", "xterm-256color"), ("LC_ALL", "C.UTF-8")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let output = spawn(&mut script).wait_with_output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    let table = out.find("in the file at").unwrap();
    let strip = out.find("\x1b[38;5;36m█").unwrap();
    assert!(table < strip, "{out}");
}
