//! Files and standard input.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata},
    io::{self, Read},
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, sync_channel},
    thread,
};

use bytes::{Bytes, BytesMut};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::Errno,
};

use crate::{
    exit::{Failure, Result, Status},
    interrupt,
};

/// Bytes to read at once.
const CHUNK_BYTES: usize = 256 * 1024;
/// A buffer with less free space than this is replaced by a new one.
const CHUNK_BYTES_MIN: usize = 16 * 1024;
/// The capacity of the channel to the consumer, in chunks.
const CHUNKS_WAITING: usize = 16;
/// How often a thread that waits for input looks for a signal.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// The largest configuration that is read from a file or standard input.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// An event in the stream of a list of files.
pub(crate) enum Input {
    /// The next chunks come from a file of this name.
    Begin(String),
    Bytes(Bytes),
    /// The file has ended.
    End,
    Failed(Failure),
}

/// Reads a list of files one after another in a separate thread, so that the consumer can also wait
/// for other events.
pub(crate) struct Inputs {
    pub(crate) receiver: Receiver<Input>,
    /// The total length in bytes, if all inputs are regular files.
    pub(crate) total: Option<u64>,
}

/// Opens all files, then starts to read. `-` is standard input, and so is an empty list.
pub(crate) fn open(files: &[PathBuf]) -> Result<Inputs> {
    let mut sources: Vec<(String, PathBuf, Box<dyn Source>)> = Vec::new();
    let mut total = Some(0);
    let stdin = [PathBuf::from("-")];
    for path in if files.is_empty() { &stdin } else { files } {
        if path.as_os_str() == "-" {
            total = None;
            sources.push((
                "stdin".to_owned(),
                PathBuf::from("standard input"),
                Box::new(io::stdin()),
            ));
            continue;
        }
        let file = open_file(path)?;
        let metadata = file.metadata().map_err(|error| Failure::file("read", path, &error))?;
        total = total.filter(|_| metadata.is_file()).map(|total| total + metadata.len());
        sources.push((base_name(path), path.clone(), Box::new(file)));
    }
    let (sender, receiver) = sync_channel(CHUNKS_WAITING);
    let read_all = move || {
        for (name, path, mut source) in sources {
            let send = |input| sender.send(input).is_ok();
            if !send(Input::Begin(name)) {
                return;
            }
            let last = match pump(&mut *source, |bytes| send(Input::Bytes(bytes))) {
                Ok(()) if interrupt::asked() => return,
                Ok(()) => Input::End,
                Err(error) => Input::Failed(Failure::file("read", &path, &error)),
            };
            if !send(last) {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("input".to_owned())
        .spawn(read_all)
        .map_err(|error| Failure::other(format!("cannot start a thread: {error}")))?;
    Ok(Inputs { receiver, total })
}

/// A file, a pipe or standard input.
trait Source: Read + AsFd + Send {}

impl<T: Read + AsFd + Send> Source for T {}

/// Passes on the data of `source` until the end, until a signal, or until `take` returns false. It
/// reads nothing after a signal, so that no line is taken out of a pipe and dropped.
fn pump(source: &mut dyn Source, mut take: impl FnMut(Bytes) -> bool) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    while has_input(source)? {
        if buffer.len() < CHUNK_BYTES_MIN {
            buffer = BytesMut::zeroed(CHUNK_BYTES);
        }
        match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => {
                if !take(buffer.split_to(read).freeze()) {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until `source` has data or has ended. Returns `false` after a signal.
fn has_input(source: &dyn Source) -> io::Result<bool> {
    while !interrupt::asked() {
        let mut fds = [PollFd::from_borrowed_fd(source.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&LOOK_EVERY)) {
            Ok(0) | Err(Errno::INTR) => {}
            ready => return Ok(ready.map(|_| true)?),
        }
    }
    Ok(false)
}

/// The last part of a path. It becomes the source of the logs.
pub(crate) fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Reads the logs of a file, or of standard input if the path is `-`. Accepts a pipe too.
pub(crate) fn read_logs(path: &Path) -> Result<Bytes> {
    if path.as_os_str() == "-" {
        read_all(path, io::stdin())
    } else {
        read_all(path, open_file(path)?)
    }
}

/// Reads a regular file, or standard input if the path is `-`.
pub(crate) fn read_file(path: &Path) -> Result<Bytes> {
    if path.as_os_str() == "-" {
        read_all(path, io::stdin())
    } else {
        read_all(path, open_regular(path)?)
    }
}

fn read_all(path: &Path, mut source: impl Read) -> Result<Bytes> {
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes).map_err(|error| Failure::file("read", path, &error))?;
    Ok(bytes.into())
}

/// Opens a file and requires that it is regular: a pipe or a device might block forever.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let check = |metadata: io::Result<Metadata>| match metadata {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(Failure::other(format!("{} is not a regular file", path.display()))),
        Err(error) => Err(Failure::file("open", path, &error)),
    };
    check(fs::metadata(path))?;
    // Another file may have replaced the checked one, so check the open file too. Open without
    // blocking: a pipe would wait for a writer.
    let mut options = File::options();
    options.read(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
    let file = options.open(path).map_err(|error| Failure::file("open", path, &error))?;
    check(file.metadata())?;
    Ok(file)
}

fn open_file(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|error| Failure::file("open", path, &error))?;
    if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return Err(Failure::other(format!(
            "{} is a directory, not a file of logs",
            path.display()
        )));
    }
    Ok(file)
}

/// The value of an option that is a literal text, `@FILE`, or `-` for standard input. The name of a
/// file may be any bytes.
pub(crate) fn text_argument(argument: &OsStr) -> Result<String> {
    match (argument.as_bytes().strip_prefix(b"@"), argument.to_str()) {
        (Some(path), _) => read_text(Path::new(OsStr::from_bytes(path))),
        (None, Some("-")) => read_limited("-", io::stdin()),
        (None, Some(text)) => Ok(text.to_owned()),
        (None, None) => Err(Failure::usage("an option that takes JSON is not UTF-8")),
    }
}

/// Reads a configuration from a regular file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    read_limited(&path.display().to_string(), open_regular(path)?)
}

fn read_limited(name: &str, source: impl Read) -> Result<String> {
    let mut text = String::new();
    match source.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text) {
        Ok(len) if len as u64 > TEXT_BYTES_MAX => {
            let message = format!(
                "{name} is too large: a configuration may have at most {TEXT_BYTES_MAX} bytes"
            );
            Err(Failure::new(Status::Other, "too_large", message))
        }
        Ok(_) => Ok(text),
        Err(error) => Err(Failure::other(format!("cannot read {name}: {error}"))),
    }
}
