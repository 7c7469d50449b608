//! What a source file refers to, found in its tokens: so also inside macros, and not in
//! comments or strings.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// Something a rule may be about.
#[derive(Debug, PartialEq, Eq)]
pub enum What {
    /// A module below the crate's root, by whatever path it was reached.
    Room(String),
    /// Another crate.
    Library(String),
    Unsafe,
}

/// One mention.
#[derive(Debug)]
pub struct Use {
    pub line: usize,
    /// The module it stands in, inline modules included.
    pub from: Vec<String>,
    pub what: What,
}

/// A file and what it mentions outside its tests.
#[derive(Debug)]
pub struct ScannedFile {
    pub path: PathBuf,
    pub uses: Vec<Use>,
}

/// Every file of a crate that is compiled outside tests, found as rustc finds them: from the
/// root file along its `mod` items.
///
/// # Errors
/// When a file is missing or is no Rust.
pub fn crate_files(root: &Path, module: Vec<String>) -> Result<Vec<ScannedFile>> {
    let mut files = Vec::new();
    let dir = root.parent().unwrap_or(Path::new(""));
    let mut open = vec![(root.to_owned(), dir.to_owned(), module)];
    while let Some((path, children, module)) = open.pop() {
        let source =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let depth = module.len();
        let scanned =
            scan(&source, module).with_context(|| format!("cannot scan {}", path.display()))?;
        for child in scanned.modules {
            let mut dir = children.clone();
            dir.extend(&child[depth..child.len() - 1]);
            let name = child.last().map_or("", String::as_str);
            let file = [dir.join(format!("{name}.rs")), dir.join(name).join("mod.rs")]
                .into_iter()
                .find(|file| file.is_file())
                .ok_or_else(|| anyhow!("{} has no file for mod {name}", path.display()))?;
            open.push((file, dir.join(name), child));
        }
        files.push(ScannedFile { path, uses: scanned.uses });
    }
    Ok(files)
}

/// The content of one file.
#[derive(Debug, Default)]
pub struct Scanned {
    pub uses: Vec<Use>,
    /// Its `mod name;` items, as full module paths.
    pub modules: Vec<Vec<String>>,
}

/// Scans the source of `module`.
///
/// # Errors
/// When it is not Rust.
pub fn scan(source: &str, module: Vec<String>) -> Result<Scanned> {
    let tokens = TokenStream::from_str(source).map_err(|error| anyhow!("not Rust: {error}"))?;
    let mut scanner = Scanner { module, found: Scanned::default() };
    scanner.stream(tokens)?;
    Ok(scanner.found)
}

struct Scanner {
    module: Vec<String>,
    found: Scanned,
}

impl Scanner {
    fn stream(&mut self, tokens: TokenStream) -> Result<()> {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            if is_test_attribute(&tokens, at) {
                at = after_item(&tokens, at + 2);
                continue;
            }
            if word(&tokens, at).as_deref() == Some("mod") {
                at += self.module_item(&tokens, at)?;
                continue;
            }
            match &tokens[at] {
                TokenTree::Ident(_) => self.name(&tokens, at)?,
                TokenTree::Group(group) => self.stream(group.stream())?,
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
            at += 1;
        }
        Ok(())
    }

    /// `mod name;` or `mod name { ... }`; returns how many tokens it took.
    fn module_item(&mut self, tokens: &[TokenTree], at: usize) -> Result<usize> {
        let Some(name) = word(tokens, at + 1) else { return Ok(1) };
        self.module.push(name);
        let taken = match tokens.get(at + 2) {
            Some(TokenTree::Group(body)) if body.delimiter() == Delimiter::Brace => {
                self.stream(body.stream())?;
                3
            }
            Some(token) if is_punct(Some(token), ';') => {
                self.found.modules.push(self.module.clone());
                3
            }
            _ => 1,
        };
        self.module.pop();
        Ok(taken)
    }

    /// A name that may begin a path, or be a keyword of interest.
    fn name(&mut self, tokens: &[TokenTree], at: usize) -> Result<()> {
        let Some(name) = word(tokens, at) else { return Ok(()) };
        let line = tokens[at].span().start().line;
        if name == "unsafe" {
            self.add(line, What::Unsafe);
            return Ok(());
        }
        // The middle of a path says nothing: its beginning did.
        let global = path_separator(tokens, at.wrapping_sub(2));
        if global && at >= 3 && word(tokens, at - 3).is_some_and(|word| word != "use") {
            return Ok(());
        }
        let introduced = at > 0 && matches!(word(tokens, at - 1).as_deref(), Some("use" | "crate"));
        if !path_separator(tokens, at + 1) {
            if introduced && !is_path_keyword(&name) {
                self.add(line, What::Library(name));
            }
            return Ok(());
        }
        match name.as_str() {
            "crate" | "proxy_daemon" => self.below(&[], tokens, at + 3),
            "super" => {
                let mut next = at;
                let mut up = 0;
                while word(tokens, next).as_deref() == Some("super")
                    && path_separator(tokens, next + 1)
                {
                    up += 1;
                    next += 3;
                }
                let Some(depth) = self.module.len().checked_sub(up) else {
                    bail!("line {line}: `super` above the crate's root");
                };
                let base = self.module[..depth].to_vec();
                self.below(&base, tokens, next);
            }
            "self" | "Self" => {}
            _ => self.add(line, What::Library(name)),
        }
        Ok(())
    }

    /// What follows a path to module `base`: a name, or a group of them. Only from the root
    /// is that a room.
    fn below(&mut self, base: &[String], tokens: &[TokenTree], at: usize) {
        if !base.is_empty() {
            return;
        }
        match tokens.get(at) {
            Some(TokenTree::Group(group)) => self.rooms_of_group(group),
            Some(token @ TokenTree::Ident(_)) => {
                if let Some(room) = word(tokens, at) {
                    self.add(token.span().start().line, What::Room(room));
                }
            }
            _ => {}
        }
    }

    fn rooms_of_group(&mut self, group: &Group) {
        let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
        for (at, token) in tokens.iter().enumerate() {
            let first = at == 0 || is_punct(tokens.get(at - 1), ',');
            if let Some(room) = word(&tokens, at).filter(|room| first && room != "self") {
                self.add(token.span().start().line, What::Room(room));
            }
        }
    }

    fn add(&mut self, line: usize, what: What) {
        self.found.uses.push(Use { line, from: self.module.clone(), what });
    }
}

fn is_path_keyword(name: &str) -> bool {
    matches!(name, "crate" | "self" | "super" | "Self")
}

fn word(tokens: &[TokenTree], at: usize) -> Option<String> {
    match tokens.get(at) {
        Some(TokenTree::Ident(name)) => Some(name.to_string().trim_start_matches("r#").to_owned()),
        _ => None,
    }
}

fn is_punct(token: Option<&TokenTree>, wanted: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == wanted)
}

/// `::` at this place.
fn path_separator(tokens: &[TokenTree], at: usize) -> bool {
    is_punct(tokens.get(at), ':') && is_punct(tokens.get(at.wrapping_add(1)), ':')
}

/// `#[cfg(test)]` or `#[cfg(all(test, ...))]`, begun at this token.
fn is_test_attribute(tokens: &[TokenTree], at: usize) -> bool {
    let Some(TokenTree::Group(group)) = tokens.get(at + 1) else { return false };
    if !is_punct(tokens.get(at), '#') || group.delimiter() != Delimiter::Bracket {
        return false;
    }
    let inner: Vec<_> = group.stream().into_iter().collect();
    word(&inner, 0).as_deref() == Some("cfg") && requires_test(inner.get(1))
}

fn requires_test(condition: Option<&TokenTree>) -> bool {
    let Some(TokenTree::Group(group)) = condition else { return false };
    let inner: Vec<_> = group.stream().into_iter().collect();
    (0..inner.len()).any(|at| {
        let starts = at == 0 || is_punct(inner.get(at - 1), ',');
        starts
            && match word(&inner, at).as_deref() {
                Some("test") => true,
                Some("all") => requires_test(inner.get(at + 1)),
                _ => false,
            }
    })
}

/// The place after the item that begins here, its further attributes included: an item ends
/// with its body in braces or with a semicolon, an import with the semicolon only.
fn after_item(tokens: &[TokenTree], mut at: usize) -> usize {
    while is_punct(tokens.get(at), '#') {
        at += 2;
    }
    let mut ends_with_braces = true;
    while let Some(token) = tokens.get(at) {
        match token {
            TokenTree::Ident(name) if matches!(name.to_string().as_str(), "use" | "static") => {
                ends_with_braces = false;
            }
            TokenTree::Punct(punct) if punct.as_char() == ';' => return at + 1,
            // A field or an enum's variant.
            TokenTree::Punct(punct) if punct.as_char() == ',' => return at + 1,
            TokenTree::Group(group)
                if ends_with_braces && group.delimiter() == Delimiter::Brace =>
            {
                return at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    at
}
