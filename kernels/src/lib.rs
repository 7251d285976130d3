//! The device kernels of Kitsune as PTX, one module for each source `kernels/<op>.cu`.
//!
//! `kernels/generate.py` compiles the sources with a pinned compiler and writes the texts and the list of them below
//! `kernels/ptx/`. A driver loads the module of an entry point when the entry point is first launched, so a program
//! compiles only what it uses.

#![no_std]

/// The oldest compute capability that the modules run on, as (major, minor). A driver compiles them for the device it has;
/// for a newer device the PTX would be the same.
pub const TARGET: (u32, u32) = (8, 0);

/// The version of the PTX language, which decides the oldest driver: 8.0 needs one for CUDA 12.0.
pub const PTX_VERSION: &str = "8.0";

/// The entry points of one source.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// The name of the source, without its ending.
    pub name: &'static str,
    /// The PTX, which ends with a NUL as drivers ask for it.
    pub text: &'static str,
    /// The names of its entry points, in alphabetical order.
    pub entries: &'static [&'static str],
}

/// All modules, by name.
pub static MODULES: &[Module] = &include!("../ptx/modules.rs");

/// The module that has the entry point `entry`.
#[must_use]
pub fn module_of(entry: &str) -> Option<&'static Module> {
    let has = |module: &&Module| module.entries.binary_search(&entry).is_ok();
    MODULES.iter().find(has)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_module_is_text_for_the_promised_version_and_device() {
        for module in MODULES {
            let (text, end) = module.text.split_at(module.text.len() - 1);
            assert_eq!(end, "\0", "{}", module.name);
            assert!(!text.contains('\0'), "{}", module.name);
            assert!(text.contains("\n.version 8.0\n"), "{}", module.name);
            assert!(text.contains("\n.target sm_80\n"), "{}", module.name);
        }
        assert_eq!((TARGET, PTX_VERSION), ((8, 0), "8.0"));
    }

    #[test]
    fn each_entry_point_is_found_in_its_module_alone() {
        for module in MODULES {
            assert!(module.entries.is_sorted(), "{}", module.name);
            let declared = module.text.matches(".visible .entry ").count();
            assert_eq!(declared, module.entries.len(), "{}", module.name);
            for entry in module.entries {
                let found = module_of(entry).expect("an entry point has a module");
                assert_eq!(found.name, module.name, "{entry}");
            }
        }
        assert!(module_of("no_such_entry").is_none());
    }
}
