//! Output of several guests at once, told apart by a word before each line.

use std::io::{self, Write};

/// Writes whole lines only, each with the label.
#[derive(Debug)]
pub(super) struct Labelled<W> {
    label: String,
    /// Of a line that has not ended yet.
    line: Vec<u8>,
    to: W,
}

impl<W: Write> Labelled<W> {
    pub(super) fn new(label: &str, to: W) -> Self {
        Self { label: label.to_owned(), line: Vec::new(), to }
    }

    /// What is left without a line's end.
    pub(super) fn end(&mut self) -> io::Result<()> {
        if self.line.is_empty() { Ok(()) } else { self.write_all(b"\n") }
    }
}

impl<W: Write> Write for Labelled<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.label.is_empty() {
            return self.to.write(bytes);
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = [self.label.as_bytes(), b"| ", &self.line].concat();
                self.line.clear();
                self.to.write_all(&line)?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_and_labelled_and_a_single_guest_has_no_label() {
        let mut labelled = Labelled::new("6.1", Vec::new());
        labelled.write_all(b"test a ... ").unwrap();
        labelled.write_all(b"ok\ntest b\nend").unwrap();
        labelled.end().unwrap();
        assert_eq!(labelled.to, b"6.1| test a ... ok\n6.1| test b\n6.1| end\n");
        let mut plain = Labelled::new("", Vec::new());
        plain.write_all(b"as it comes").unwrap();
        plain.end().unwrap();
        assert_eq!(plain.to, b"as it comes");
    }
}
