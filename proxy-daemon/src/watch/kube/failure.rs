//! Failures of the API, sorted by what they mean to whoever reads the log.

use std::error::Error;

use kube::core::Status;

use crate::watch::intake::Closed;
use crate::watch::stats::Cause;

/// Why listing or watching stopped.
#[derive(Debug)]
pub(super) enum Halt {
    Closed,
    Failed(Failure),
}

impl From<Closed> for Halt {
    fn from(Closed: Closed) -> Self {
        Self::Closed
    }
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

#[derive(Debug)]
pub(super) struct Failure {
    pub(super) cause: Cause,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into() }
    }

    /// Whether events may have been missed, so that only a new list helps.
    pub(super) const fn must_relist(&self) -> bool {
        matches!(self.cause, Cause::Expired | Cause::Rubbish)
    }
}

impl From<&Status> for Failure {
    fn from(status: &Status) -> Self {
        let cause = match status.code {
            401 => Cause::Unauthorized,
            403 => Cause::Forbidden,
            404 => Cause::Absent,
            410 => Cause::Expired,
            _ => Cause::Status,
        };
        let mut message = format!("HTTP {}", status.code);
        for text in [&status.reason, &status.message] {
            if !text.is_empty() && !message.ends_with(text.as_str()) {
                message = format!("{message}: {}", text.trim());
            }
        }
        Self { cause, message }
    }
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        let cause = match &error {
            kube::Error::Api(status) => return (&**status).into(),
            kube::Error::SerdeError(_)
            | kube::Error::FromUtf8(_)
            | kube::Error::LinesCodecMaxLineLengthExceeded => Cause::Rubbish,
            kube::Error::Auth(_) => Cause::Unauthorized,
            _ => Cause::Unreachable,
        };
        Self { cause, message: chain(&error) }
    }
}

/// The error with its sources; many of them repeat theirs in their own text.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}
