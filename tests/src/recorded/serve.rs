//! How the recorded file system answers the kernel.
//!
//! Source: Linux `fs/fuse/file.c` for what the kernel makes of the answers: with `FOPEN_DIRECT_IO` a short answer is a short
//! read or write of the caller. Such a write that is to be durable (`RWF_SYNC`) has the flag O_SYNC and is followed by no sync: that is
//! the file system's business.

use std::ffi::OsStr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::Shared;
use super::files::{Files, ROOT};
use super::rules::{Kind, Verdict};
use crate::simulated::Operation;

/// The kernel asks again each time.
const TTL: Duration = Duration::ZERO;
const ANYWHERE: Range<u64> = 0..u64::MAX;

/// The file system as the kernel sees it.
pub(super) struct Server(pub(super) Arc<Shared>);

impl Server {
    fn judge(&self, kind: Kind, touched: &Range<u64>) -> Verdict {
        self.0.lock().rules.judge(kind, touched)
    }

    /// Does an operation, in the time that it is to take.
    fn perform(&self, inode: u64, operation: Operation, verdict: Verdict) {
        let record = self.0.lock().files.begin(inode, operation);
        if !verdict.delay.is_zero() {
            std::thread::sleep(verdict.delay);
        }
        self.0.lock().files.end(inode, record);
    }

    /// The operation, unless it is to fail.
    fn try_perform(&self, inode: u64, kind: Kind, operation: Operation) -> Result<(), Errno> {
        let touched = match &operation {
            Operation::SetLen(len) => *len..len + 1,
            Operation::Sync | Operation::SyncOf(_) | Operation::FailedSync => ANYWHERE,
            Operation::Write { .. } | Operation::Punch(_) => operation.touched(),
        };
        let verdict = self.judge(kind, &touched);
        match verdict.failure {
            None => {
                self.perform(inode, operation, verdict);
                Ok(())
            }
            Some(errno) => {
                // An interrupted sync has not failed: nothing was given up.
                let is_sync = matches!(operation, Operation::Sync | Operation::SyncOf(_));
                if is_sync && errno != nix::errno::Errno::EINTR {
                    self.perform(inode, Operation::FailedSync, verdict);
                }
                Err(Errno::from_i32(errno as i32))
            }
        }
    }

    fn attributes(&self, inode: u64) -> Result<FileAttr, Errno> {
        let inner = self.0.lock();
        attributes(&inner.files, inode).ok_or(Errno::ENOENT)
    }
}

fn attributes(files: &Files, inode: u64) -> Option<FileAttr> {
    let names = files.names().values().filter(|named| **named == inode);
    let nlink = u32::try_from(names.count().max(1)).expect("there are few names");
    let (size, blocks, kind, perm) = if inode == ROOT {
        (0, 0, FileType::Directory, 0o755)
    } else {
        let contents = &files.get(inode)?.contents;
        let held = contents.pages_held() * 8;
        (contents.len_bytes(), held, FileType::RegularFile, 0o644)
    };
    let epoch: SystemTime = UNIX_EPOCH;
    Some(FileAttr {
        ino: INodeNo(inode),
        size,
        blocks,
        atime: epoch,
        mtime: epoch,
        ctime: epoch,
        crtime: epoch,
        kind,
        perm,
        nlink,
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    })
}

fn text(name: &OsStr) -> Result<&str, Errno> {
    name.to_str().ok_or(Errno::EINVAL)
}

fn open_flags() -> FopenFlags {
    FopenFlags::FOPEN_DIRECT_IO
        | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        | FopenFlags::FOPEN_NOFLUSH
}

/// Answers with the value of a result, or its error.
macro_rules! answer {
    ($reply:ident, $result:expr, $value:pat => $good:expr) => {
        match $result {
            Ok($value) => $good,
            Err(errno) => $reply.error(errno),
        }
    };
}

impl Filesystem for Server {
    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = text(name).and_then(|name| {
            let inner = self.0.lock();
            let inode = inner.files.names().get(name).copied();
            let found = inode.and_then(|inode| attributes(&inner.files, inode));
            found.ok_or(Errno::ENOENT)
        });
        answer!(reply, found, attr => reply.entry(&TTL, &attr, Generation(0)));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.attributes(ino.0), attr => reply.attr(&TTL, &attr));
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = size.map_or(Ok(()), |len| {
            self.try_perform(ino.0, Kind::Truncate, Operation::SetLen(len))
        });
        let attr = set.and_then(|()| self.attributes(ino.0));
        answer!(reply, attr, attr => reply.attr(&TTL, &attr));
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let made = text(name).map(|name| {
            let mut inner = self.0.lock();
            let inode = inner.files.put(name, crate::simulated::Contents::default());
            attributes(&inner.files, inode).expect("it was just made")
        });
        answer!(reply, made, attr =>
            reply.created(&TTL, &attr, Generation(0), FileHandle(0), open_flags()));
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = text(name).map(|name| {
            let mut inner = self.0.lock();
            inner.files.change_names(|names| {
                let _ = names.remove(name);
            });
        });
        answer!(reply, done, () => reply.ok());
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _newparent: INodeNo,
        newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let done = text(name).and_then(|name| {
            let newname = text(newname)?;
            let mut inner = self.0.lock();
            inner.files.change_names(|names| {
                if let Some(inode) = names.remove(name) {
                    names.insert(newname.to_owned(), inode);
                }
            });
            Ok(())
        });
        answer!(reply, done, () => reply.ok());
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        _newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let made = text(newname).and_then(|name| {
            let mut inner = self.0.lock();
            inner.files.change_names(|names| {
                names.insert(name.to_owned(), ino.0);
            });
            attributes(&inner.files, ino.0).ok_or(Errno::ENOENT)
        });
        answer!(reply, made, attr => reply.entry(&TTL, &attr, Generation(0)));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), open_flags());
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let verdict = self.judge(Kind::Read, &(offset..offset + u64::from(size)));
        if !verdict.delay.is_zero() {
            std::thread::sleep(verdict.delay);
        }
        if let Some(errno) = verdict.failure {
            return reply.error(Errno::from_i32(errno as i32));
        }
        let size = verdict.at_most.map_or(size, |most| most.min(size));
        let bytes = {
            let inner = self.0.lock();
            inner.files.get(ino.0).map(|file| {
                let end = (offset + u64::from(size)).min(file.contents.len_bytes());
                file.contents.bytes(offset.min(end)..end)
            })
        };
        answer!(reply, bytes.ok_or(Errno::EBADF), bytes => reply.data(&bytes));
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let verdict = self.judge(Kind::Write, &(offset..offset + data.len() as u64));
        if let Some(errno) = verdict.failure {
            return reply.error(Errno::from_i32(errno as i32));
        }
        let most = verdict.at_most.map_or(data.len(), |most| most as usize);
        let done = &data[..most.min(data.len())];
        if !done.is_empty() {
            let (at, bytes) = (offset, done.into());
            self.perform(ino.0, Operation::Write { at, bytes }, verdict);
        }
        if flags.0 & libc::O_SYNC == libc::O_SYNC {
            let sync = Operation::SyncOf(offset..offset + done.len() as u64);
            if let Err(errno) = self.try_perform(ino.0, Kind::Sync, sync) {
                return reply.error(errno);
            }
        }
        reply.written(u32::try_from(done.len()).expect("the kernel writes less at once"));
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let done = self.try_perform(ino.0, Kind::Sync, Operation::Sync);
        answer!(reply, done, () => reply.ok());
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        if let Some(errno) = self.judge(Kind::SyncNames, &ANYWHERE).failure {
            return reply.error(Errno::from_i32(errno as i32));
        }
        self.0.lock().files.sync_names();
        reply.ok();
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let clears = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        let keeps_len = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let len = self.attributes(ino.0).map_or(0, |attr| attr.size);
        let (touched, end) = (offset..offset + length, offset + length);
        if let Some(errno) = self.judge(Kind::Allocate, &touched).failure {
            return reply.error(Errno::from_i32(errno as i32));
        }
        let nothing = Verdict::default();
        if clears {
            self.perform(ino.0, Operation::Punch(touched), nothing);
        }
        if !keeps_len && end > len {
            self.perform(ino.0, Operation::SetLen(end), nothing);
        }
        reply.ok();
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let inner = self.0.lock();
        let fixed = [(".", ROOT), ("..", ROOT)].map(|(name, ino)| (name, ino, FileType::Directory));
        let files = inner.files.names().iter();
        let files = files.map(|(name, &ino)| (name.as_str(), ino, FileType::RegularFile));
        let all = fixed.into_iter().chain(files).zip(1..);
        for ((name, ino, kind), next) in all.skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if reply.add(INodeNo(ino), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
