//! The object without what only a debugger reads.
//!
//! BTF is made from debug information, so the programs are compiled with it, and the linker
//! leaves all of it in: four fifths of the object, which every node's image would carry. `.BTF`
//! and `.BTF.ext` stay: the kernel checks the types and the source lines in them, and a
//! verifier's log names those lines.

use anyhow::{Context as _, Result};
use object::build::ByteString;
use object::build::elf::{Builder, Section, SectionData};
use object::elf::{SHF_EXECINSTR, SHT_STRTAB};

/// Neither debug information nor relocations of anything but code.
///
/// # Errors
/// Not an ELF file that can be written again.
pub fn strip(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).context("the eBPF object cannot be read")?;
    let has_code = |section: &Section<'_>| section.sh_flags & u64::from(SHF_EXECINSTR) != 0;
    let code: Vec<_> = builder.sections.iter().filter(|s| has_code(s)).map(Section::id).collect();
    for section in &mut builder.sections {
        let relocates_data = section.sh_info_section.is_some_and(|of| !code.contains(&of));
        section.delete = section.name.starts_with(b".debug_")
            || (section.name.starts_with(b".rel") && relocates_data);
    }
    // The linker keeps the names of sections and of symbols in one table, the writer in two.
    if !builder.sections.iter().any(|s| matches!(s.data, SectionData::SectionString)) {
        let names = builder.sections.add();
        names.name = ByteString::from(".shstrtab");
        names.sh_type = SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("the eBPF object cannot be written again")?;
    Ok(stripped)
}

#[cfg(test)]
mod tests {
    use object::build::elf::{Relocation, SectionId};
    use object::elf;
    use object::read::elf::ElfFile64;
    use object::{
        Endianness, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget,
    };

    use super::*;

    const CODE: &[u8] = &[0x18, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    fn section(builder: &mut Builder<'_>, name: &'static str, flags: u32) -> SectionId {
        let section = builder.sections.add();
        section.name = ByteString::from(name);
        section.sh_type = elf::SHT_PROGBITS;
        section.sh_flags = flags.into();
        section.sh_addralign = 8;
        section.data = SectionData::Data(CODE.into());
        section.id()
    }

    /// As the linker writes it: whatever is relocated names the same symbol, and the debug
    /// sections have symbols of their own before it.
    fn linked() -> Vec<u8> {
        let mut builder = Builder::new(Endianness::Little, true);
        builder.header.e_type = elf::ET_REL;
        builder.header.e_machine = elf::EM_BPF;
        let relocated = [
            section(&mut builder, "classifier", elf::SHF_ALLOC | elf::SHF_EXECINSTR),
            section(&mut builder, ".debug_info", 0),
            section(&mut builder, ".BTF.ext", 0),
        ];
        let maps = section(&mut builder, "maps", elf::SHF_ALLOC | elf::SHF_WRITE);
        let others = [".rodata", "license", "proxy_layout", ".BTF", ".debug_str"].map(|name| {
            section(&mut builder, name, if name == ".BTF" { 0 } else { elf::SHF_ALLOC })
        });
        for (section, kind) in [(relocated[1], elf::STT_SECTION), (others[4], elf::STT_SECTION)] {
            let symbol = builder.symbols.add();
            symbol.section = Some(section);
            symbol.set_st_info(elf::STB_LOCAL, kind);
        }
        let map = builder.symbols.add();
        map.name = ByteString::from("FLOWS");
        map.section = Some(maps);
        map.set_st_info(elf::STB_GLOBAL, elf::STT_OBJECT);
        let map = map.id();
        let table = builder.sections.add();
        table.name = ByteString::from(".symtab");
        table.sh_type = elf::SHT_SYMTAB;
        table.sh_entsize = 24;
        table.sh_addralign = 8;
        table.data = SectionData::Symbol;
        let table = table.id();
        for (name, of) in
            [".relclassifier", ".rel.debug_info", ".rel.BTF.ext"].iter().zip(relocated)
        {
            let section = builder.sections.add();
            section.name = ByteString::from(*name);
            section.sh_type = elf::SHT_REL;
            section.sh_flags = elf::SHF_INFO_LINK.into();
            section.sh_entsize = 16;
            section.sh_addralign = 8;
            section.sh_link_section = Some(table);
            section.sh_info_section = Some(of);
            let relocation = Relocation { r_offset: 0, symbol: Some(map), r_type: 1, r_addend: 0 };
            section.data = SectionData::Relocation(vec![relocation]);
        }
        for (name, data) in
            [(".strtab", SectionData::String), (".shstrtab", SectionData::SectionString)]
        {
            let section = builder.sections.add();
            section.name = ByteString::from(name);
            section.sh_type = elf::SHT_STRTAB;
            section.sh_addralign = 1;
            section.data = data;
            let id = section.id();
            if name == ".strtab" {
                builder.sections.get_mut(table).sh_link_section = Some(id);
            }
        }
        builder.set_section_sizes();
        let mut bytes = Vec::new();
        builder.write(&mut bytes).unwrap();
        bytes
    }

    fn names(object: &[u8]) -> Vec<String> {
        let file: ElfFile64<'_> = ElfFile64::parse(object).unwrap();
        file.sections().map(|section| section.name().unwrap().to_owned()).collect()
    }

    #[test]
    fn what_the_loader_reads_stays_and_nothing_else() {
        let linked = linked();
        assert!(names(&linked).iter().any(|name| name == ".rel.debug_info"), "a fair test");
        let stripped = strip(&linked).unwrap();
        let names = names(&stripped);
        assert!(!names.iter().any(|name| name.contains("debug")), "{names:?}");
        for name in [
            "classifier",
            ".relclassifier",
            "maps",
            ".rodata",
            "license",
            "proxy_layout",
            ".BTF",
            ".BTF.ext",
        ] {
            assert!(names.iter().any(|there| there == name), "{name} of {names:?}");
        }
        assert!(!names.iter().any(|name| name == ".rel.BTF.ext"), "{names:?}");
    }

    #[test]
    fn code_names_the_same_map_as_before() {
        let stripped = strip(&linked()).unwrap();
        let file: ElfFile64<'_> = ElfFile64::parse(&*stripped).unwrap();
        let code = file.section_by_name("classifier").unwrap();
        assert_eq!(code.data().unwrap(), CODE);
        let targets: Vec<_> = code
            .relocations()
            .map(|(offset, relocation)| match relocation.target() {
                RelocationTarget::Symbol(index) => {
                    let symbol = file.symbol_by_index(index).unwrap();
                    (offset, symbol.name().unwrap().to_owned())
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(targets, [(0, "FLOWS".to_owned())]);
    }
}
