//! The object file with the programs: where it comes from, and whether it fits.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::{env, fs};

use object::{Object as _, ObjectSection as _};
use proxy_ebpf::layout::Mark;

use super::LoadError;

/// At build time: the file to embed. At run time: the file to use instead.
pub const OBJECT_ENV: &str = "PROXY_EBPF_OBJECT";

/// Empty when the build had none. Aligned, because ELF headers are read in place.
static EMBEDDED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/proxy-ebpf.o"));

/// The object that [`OBJECT_ENV`] names, else the embedded one.
///
/// # Errors
/// There is neither, or the file cannot be read.
pub fn object() -> Result<Cow<'static, [u8]>, LoadError> {
    match env::var_os(OBJECT_ENV).filter(|path| !path.is_empty()) {
        Some(path) => read(Path::new(&path)).map(Cow::Owned),
        None if EMBEDDED.is_empty() => Err(LoadError::NoObject),
        None => Ok(Cow::Borrowed(EMBEDDED)),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    fs::read(path).map_err(|source| LoadError::Read { path: PathBuf::from(path), source })
}

/// Refuses an object whose maps are laid out otherwise than this daemon reads and writes
/// them: the kernel would take it, and traffic would go astray.
///
/// # Errors
/// Not an object file of ours, or of another layout.
pub fn check_layout(object: &[u8]) -> Result<(), LoadError> {
    let unusable = |reason: &dyn std::fmt::Display| LoadError::Object(reason.to_string());
    let file = object::File::parse(object).map_err(|e| unusable(&e))?;
    let section = file
        .section_by_name(Mark::SECTION)
        .ok_or_else(|| unusable(&format_args!("it has no section {}", Mark::SECTION)))?;
    let data = section.data().map_err(|e| unusable(&e))?;
    let bytes = data.try_into().map_err(|_| {
        unusable(&format_args!(
            "section {} has {} bytes instead of {}",
            Mark::SECTION,
            data.len(),
            Mark::SIZE
        ))
    })?;
    let found = Mark::from_section(bytes);
    if found == Mark::CURRENT { Ok(()) } else { Err(LoadError::Layout { found }) }
}

#[cfg(test)]
mod tests {
    use object::write::{Object, StandardSegment};
    use object::{Architecture, BinaryFormat, Endianness, SectionKind};

    use super::*;

    fn elf(section: &str, mark: Mark, length: usize) -> Vec<u8> {
        let mut bytes = mark.version.to_le_bytes().to_vec();
        bytes.extend(mark.pad.to_le_bytes());
        bytes.extend(mark.fingerprint.to_le_bytes());
        bytes.resize(length, 0);
        let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        let segment = object.segment_name(StandardSegment::Data).to_vec();
        let id = object.add_section(segment, section.into(), SectionKind::Data);
        object.append_section_data(id, &bytes, 8);
        object.write().unwrap()
    }

    #[test]
    fn only_the_daemons_own_layout_is_taken() {
        assert!(check_layout(&elf(Mark::SECTION, Mark::CURRENT, Mark::SIZE)).is_ok());
        for other in [
            Mark { version: Mark::CURRENT.version + 1, ..Mark::CURRENT },
            Mark { fingerprint: 0, ..Mark::CURRENT },
        ] {
            let error = check_layout(&elf(Mark::SECTION, other, Mark::SIZE)).unwrap_err();
            assert!(matches!(error, LoadError::Layout { found } if found == other), "{error}");
        }
    }

    #[test]
    fn what_is_no_object_of_ours_is_refused() {
        for (bytes, reason) in [
            (Vec::new(), ""),
            (b"#!/bin/sh".to_vec(), ""),
            (elf("license", Mark::CURRENT, Mark::SIZE), "no section"),
            (elf(Mark::SECTION, Mark::CURRENT, Mark::SIZE + 1), "17 bytes"),
        ] {
            let error = check_layout(&bytes).unwrap_err();
            assert!(matches!(error, LoadError::Object(_)), "{error}");
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}
