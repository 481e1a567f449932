//! Who has an image in use: so that its user knows which program to stop.
//!
//! The kernel does not say who holds an open-file-description lock, but shows with each open file of a process which
//! locks it has. Only those processes are seen that this one may look at, and from a sandbox none.

use std::fmt;
use std::fs::{self, File};
use std::os::fd::AsRawFd;

/// A program that has locks on an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its name, as the kernel knows it.
    pub name: String,
    /// Its number.
    pub process: u32,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, process {}", self.name, self.process)
    }
}

/// Another process with locks on the file, on which the open `file` has some.
pub(crate) fn of(file: &File) -> Option<Holder> {
    let ours = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let place = locked_place(&ours)?;
    let numbers = fs::read_dir("/proc").ok()?.flatten();
    let mut processes = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let process = processes.find(|&process| {
        let is_other = process != std::process::id();
        is_other && has_locks_on(process, place)
    })?;
    let name = fs::read_to_string(format!("/proc/{process}/comm")).ok()?;
    let name = name.trim_end().to_owned();
    Some(Holder { name, process })
}

fn has_locks_on(process: u32, place: &str) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{process}/fdinfo")) else {
        return false;
    };
    files.flatten().any(|file| {
        let info = fs::read_to_string(file.path());
        info.is_ok_and(|info| locked_place(&info) == Some(place))
    })
}

/// The device and inode of the file that an open file has such locks on, as `/proc/PID/fdinfo` writes them.
fn locked_place(info: &str) -> Option<&str> {
    let locks = info.lines().filter(|line| line.starts_with("lock:"));
    let mut ofd = locks.filter(|line| line.contains("OFDLCK"));
    // lock:	1: OFDLCK ADVISORY READ -1 fe:00:12345 100 100
    ofd.next()?.split_whitespace().nth(6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_that_of_open_file_description_locks() {
        let info = "pos:\t0\nflags:\t0100002\nino:\t7\nlock:\t1: POSIX  ADVISORY  WRITE 9 fe:00:7 0 EOF\n\
                    lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:7 100 100\n";
        assert_eq!(locked_place(info), Some("fe:00:7"));
        assert_eq!(locked_place("pos:\t0\nino:\t7\n"), None);
    }
}
