//! Writing a file so that it is the old one or the new one, whatever happens meanwhile.
//!
//! The new content goes to a file beside it, is flushed to the disk, and takes the name in one step. A failure
//! leaves the old file and nothing else. A process that is killed in between leaves a hidden file that ends in
//! `.tmp`, which can be deleted.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Makes `path` a file with what `write` writes. What follows a symbolic link is replaced, not the link.
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
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let beside = name_beside(&target).map_err(failed)?;
    let written = fill(&beside, write).and_then(|()| fs::rename(&beside, &target));
    if let Err(error) = written {
        // It may never have come to be; and the first error is the one to tell.
        let _ = fs::remove_file(&beside);
        return Err(failed(error));
    }
    flush_directory(&target).map_err(failed)
}

/// A name in the same directory that no other writer has.
fn name_beside(target: &Path) -> io::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = target.file_name().filter(|_| !target.is_dir()) else {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    };
    // Relaxed: the number only has to be unique.
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut beside = OsString::from(".");
    beside.push(name);
    beside.push(format!(".{}-{number}.tmp", std::process::id()));
    Ok(target.with_file_name(beside))
}

fn fill(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    let mut writer = BufWriter::new(file);
    write(&mut writer)?;
    let file = writer
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?;
    file.sync_all()
}

/// Flushes the directory of `target`, in which the new name stands.
fn flush_directory(target: &Path) -> io::Result<()> {
    if cfg!(not(unix)) {
        return Ok(());
    }
    match target
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
    {
        Some(parent) => File::open(parent)?.sync_all(),
        None => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty directory of the test called `name`.
    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kitsune-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        path
    }

    fn names(directory: &Path) -> Vec<OsString> {
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
        let directory = directory("link");
        let (link, path) = (directory.join("link"), directory.join("state"));
        fs::write(&path, b"old").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        replace(&link, |file| file.write_all(b"new")).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&path).unwrap(), b"new");
        fs::remove_dir_all(&directory).unwrap();
    }
}
