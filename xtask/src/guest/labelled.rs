//! Output of several guests at once, told apart by a word before each line.

use std::io::{self, Write};
use std::time::Instant;

/// Writes whole lines only, each with the label and the seconds since the start.
#[derive(Debug)]
pub(super) struct Labelled<W> {
    label: String,
    start: Instant,
    /// Of a line that has not ended yet.
    line: Vec<u8>,
    to: W,
}

impl<W: Write> Labelled<W> {
    pub(super) fn new(label: &str, start: Instant, to: W) -> Self {
        Self { label: label.to_owned(), start, line: Vec::new(), to }
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
                let mut line =
                    format!("{} {:>4}| ", self.label, self.start.elapsed().as_secs()).into_bytes();
                line.append(&mut self.line);
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
        let mut labelled = Labelled::new("6.1", Instant::now(), Vec::new());
        labelled.write_all(b"test a ... ").unwrap();
        labelled.write_all(b"ok\ntest b\nend").unwrap();
        labelled.end().unwrap();
        assert_eq!(labelled.to, b"6.1    0| test a ... ok\n6.1    0| test b\n6.1    0| end\n");
        let mut plain = Labelled::new("", Instant::now(), Vec::new());
        plain.write_all(b"as it comes").unwrap();
        plain.end().unwrap();
        assert_eq!(plain.to, b"as it comes");
    }
}
