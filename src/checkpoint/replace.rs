//! Writing a file so that it is the old one or the new one, whatever happens meanwhile.
//!
//! The new content goes to a file in the same folder, is flushed to the disk, and takes the name in one step; then the
//! folder is flushed. A failure leaves the old file and nothing else, but for one of the last flush, which says that the
//! new file is there.
//!
//! Where the system can, the new file has no name while it is written, so that nothing is left of it when the process
//! is killed. Elsewhere, and for a moment before it takes its name, it is a hidden file that ends in `.tmp`, which can
//! be deleted.
//!
//! Only a regular file is replaced: a device, a pipe or a folder of that name stays.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Most links on the way to a file, as systems have it.
const LINKS_MAX: usize = 40;

/// Where this process finds the files that it has open.
#[cfg(target_os = "linux")]
const OPEN_FILES: &str = "/proc/self/fd";

/// Most bytes of a name that the name beside it repeats; systems take 255 in all.
const NAME_MAX: usize = 200;

/// Makes `path` a file with what `write` writes. What follows a symbolic link is replaced, not the link. Who may read
/// and write the file stays as it was.
///
/// # Errors
/// [`Error::File`] if any step fails, or the error of `write`.
pub(super) fn replace(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let failed = |source| Error::File {
        action: "write",
        path: path.to_owned(),
        source,
    };
    let target = followed(path).map_err(failed)?;
    put(&target, nameless(&target), write).map_err(failed)
}

/// Makes `target` a file with what `write` writes, by way of `nameless`, a new file without a name, if there is one.
fn put(
    target: &Path,
    nameless: Option<File>,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    match nameless {
        Some(file) => put_nameless(file, target, write),
        None => put_named(target, write),
    }?;
    flush_directory(target).map_err(|error| {
        let told =
            format!("the new file is in place, but may not outlast a loss of power: {error}");
        io::Error::new(error.kind(), told)
    })
}

/// Fills `file`, gives it a name, and then that of `target`: no system does both at once over a file that is there.
fn put_nameless(
    file: File,
    target: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let file = fill(file, target, write)?;
    let (beside, ()) = beside(target, |path| link(&file, path))?;
    take_name(&beside, target)
}

/// Fills a file beside `target`, which then takes its name.
fn put_named(
    target: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let create = |path: &Path| OpenOptions::new().write(true).create_new(true).open(path);
    let (beside, file) = beside(target, create)?;
    if let Err(error) = fill(file, target, write) {
        // The first error is the one to tell.
        let _ = fs::remove_file(&beside);
        return Err(error);
    }
    take_name(&beside, target)
}

/// Makes the file `beside` the file `target`, or removes it.
fn take_name(beside: &Path, target: &Path) -> io::Result<()> {
    let taken = fs::rename(beside, target);
    if taken.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(beside);
    }
    taken
}

/// A new file without a name in the folder of `target`, if the system has such files and can name them later.
#[cfg(target_os = "linux")]
fn nameless(target: &Path) -> Option<File> {
    use rustix::fs::{Mode, OFlags};
    let can_be_named = Path::new(OPEN_FILES).is_dir();
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    // As for every new file; the system takes away what its users do not want.
    let file = rustix::fs::open(folder(target), flags, Mode::from_raw_mode(0o666));
    file.ok().filter(|_| can_be_named).map(File::from)
}

/// Names the file, which has no name.
#[cfg(target_os = "linux")]
fn link(file: &File, path: &Path) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD};
    use std::os::fd::AsRawFd;
    let open = format!("{OPEN_FILES}/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(
        CWD,
        open,
        CWD,
        path,
        AtFlags::SYMLINK_FOLLOW,
    )?)
}

#[cfg(not(target_os = "linux"))]
fn nameless(_: &Path) -> Option<File> {
    None
}

#[cfg(not(target_os = "linux"))]
fn link(_: &File, _: &Path) -> io::Result<()> {
    Err(io::Error::from(ErrorKind::Unsupported))
}

/// The file that `path` leads to: a regular one, or one that is not there.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_owned();
    for _ in 0..LINKS_MAX {
        let kind = match fs::symlink_metadata(&target) {
            Ok(about) => about.file_type(),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(target),
            Err(error) => return Err(error),
        };
        if kind.is_file() {
            return Ok(target);
        }
        if !kind.is_symlink() {
            return Err(io::Error::other("not a regular file"));
        }
        let next = fs::read_link(&target)?;
        // Relative to the folder that the link is in.
        target = target.parent().unwrap_or(Path::new("")).join(next);
    }
    Err(io::Error::other("a chain of symbolic links without an end"))
}

/// What `make` makes of a name in the same folder that nobody else has: also not a process of the same number that was
/// killed, as it may have been in a container.
fn beside<T>(target: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = target.file_name() else {
        return Err(io::Error::from(ErrorKind::IsADirectory));
    };
    loop {
        // Relaxed: the number only has to be unique.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut hidden = OsString::from(".");
        hidden.push(if name.len() > NAME_MAX {
            "kitsune".as_ref()
        } else {
            name
        });
        hidden.push(format!(".{}-{number}.tmp", std::process::id()));
        let path = target.with_file_name(hidden);
        match make(&path) {
            Ok(made) => return Ok((path, made)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Fills `file`, which is to stand in for `target`, down to the disk.
fn fill(
    file: File,
    target: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<File> {
    let mut writer = BufWriter::new(file);
    write(&mut writer)?;
    let file = writer
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?;
    if let Ok(about) = fs::metadata(target) {
        file.set_permissions(about.permissions())?;
    }
    file.sync_all()?;
    Ok(file)
}

/// The folder that `target` is in.
fn folder(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Flushes the directory of `target`, in which the new name stands.
fn flush_directory(target: &Path) -> io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    File::open(folder(target))?.sync_all()
}

#[cfg(all(test, target_os = "linux"))]
mod system_calls;

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty directory of the test called `name`.
    pub(super) fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kitsune-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        path
    }

    pub(super) fn names(directory: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_file_is_the_old_one_or_the_new_one() {
        let directory = directory("replace");
        let path = directory.join("state");
        replace(&path, |file| file.write_all(b"old")).unwrap();
        let full = |file: &mut dyn Write| {
            file.write_all(&vec![1; 1 << 20])?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        };
        let error = replace(&path, full).unwrap_err();
        assert!(error.to_string().starts_with("cannot write /"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&directory), ["state"]);
        replace(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(&directory), ["state"]);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_being_written_has_no_name_where_the_system_can() {
        let directory = directory("nameless");
        let path = directory.join("state");
        if nameless(&path).is_some() {
            let write = |file: &mut dyn Write| {
                assert!(names(&directory).is_empty());
                file.write_all(b"new")
            };
            replace(&path, write).unwrap();
        }
        // The other way, as on systems that cannot.
        put_named(&path, |file| {
            assert!(names(&directory).iter().any(|name| name != "state"));
            file.write_all(b"newer")
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"newer");
        assert!(put_named(&path, |_| Err(io::Error::from(ErrorKind::StorageFull))).is_err());
        assert_eq!(names(&directory), ["state"]);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_name_that_is_taken_by_a_folder_meanwhile_stays_the_folders() {
        let directory = directory("taken");
        let path = directory.join("state");
        for has_name in [false, true] {
            let nameless = nameless(&path).filter(|_| !has_name);
            let outcome = put(&path, nameless, |file| {
                fs::create_dir(&path)?;
                file.write_all(b"new")
            });
            assert!(outcome.is_err());
            assert_eq!(names(&directory), ["state"]);
            fs::remove_dir(&path).unwrap();
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn places_that_cannot_be_written_are_refused() {
        let directory = directory("places");
        let missing = directory.join("missing").join("state");
        for path in [&directory, &missing, Path::new("/"), Path::new("")] {
            assert!(replace(path, |_| Ok(())).is_err(), "{}", path.display());
        }
        assert!(names(&directory).is_empty());
        fs::remove_dir_all(&directory).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn what_a_link_points_to_is_replaced() {
        use std::os::unix::fs::symlink;
        let directory = directory("link");
        let [first, second, lost, ring, there, again] =
            ["first", "second", "lost", "ring", "state", "again"].map(|name| directory.join(name));
        fs::write(&there, b"old").unwrap();
        // Over a link to a link; relative to the folder of the link; to a file that is yet to be.
        symlink(&second, &first).unwrap();
        symlink("state", &second).unwrap();
        symlink("again", &lost).unwrap();
        for (link, path) in [(&first, &there), (&lost, &again)] {
            replace(link, |file| file.write_all(b"new")).unwrap();
            assert!(fs::symlink_metadata(link).unwrap().is_symlink());
            assert_eq!(fs::read(path).unwrap(), b"new");
        }
        symlink(&ring, &ring).unwrap();
        let error = replace(&ring, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("without an end"), "{error}");
        assert!(fs::symlink_metadata(&ring).unwrap().is_symlink());
        fs::remove_dir_all(&directory).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_regular_file_stays() {
        use std::os::unix::net::UnixListener;
        let directory = directory("special");
        let (path, link) = (directory.join("socket"), directory.join("link"));
        let _socket = UnixListener::bind(&path).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for name in [&path, &link] {
            let error = replace(name, |_| Ok(())).unwrap_err();
            let told = format!("cannot write {}: not a regular file", name.display());
            assert_eq!(error.to_string(), told);
        }
        assert!(!fs::symlink_metadata(&path).unwrap().is_file());
        assert_eq!(names(&directory).len(), 2);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn who_may_read_a_file_stays() {
        use std::os::unix::fs::PermissionsExt;
        let directory = directory("mode");
        let path = directory.join("state");
        fs::write(&path, b"old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        replace(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn names_may_be_long_and_leftovers_are_passed_over() {
        let directory = directory("names");
        for name in ["state".to_owned(), "s".repeat(255)] {
            let short = if name.len() > NAME_MAX {
                "kitsune"
            } else {
                &name
            };
            let process = std::process::id();
            // More than the other tests of this process take meanwhile.
            let left: Vec<_> = (0..1000)
                .map(|number| directory.join(format!(".{short}.{process}-{number}.tmp")))
                .collect();
            left.iter()
                .for_each(|path| fs::write(path, b"left").unwrap());
            let path = directory.join(&name);
            replace(&path, |file| file.write_all(b"new")).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
            assert!(left.iter().all(|path| fs::read(path).unwrap() == b"left"));
            left.iter().for_each(|path| fs::remove_file(path).unwrap());
        }
        assert_eq!(names(&directory).len(), 2);
        fs::remove_dir_all(&directory).unwrap();
    }
}
