//! The API server's URL out of what was given for it.

/// Completes `given` as client-go does (`rest.DefaultServerURL`): without a scheme it is
/// `HOST` or `HOST:PORT`, spoken to over TLS when there are settings for that.
pub(super) fn url(given: &str, tls: bool) -> Result<String, String> {
    let complete = match given.split_once("://") {
        Some((scheme, _)) => {
            if !["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) {
                return Err(format!("the scheme {scheme:?} is neither http nor https"));
            }
            given.to_owned()
        }
        None => {
            if given.trim_end_matches('/').contains('/') {
                return Err("must be a URL or HOST:PORT".to_owned());
            }
            format!("{}://{given}", if tls { "https" } else { "http" })
        }
    };
    // What the client joins its paths to; without a host it would panic with the first of them.
    let host = complete.split_once("://").map_or("", |(_, rest)| rest);
    if host.is_empty() || host.starts_with(['/', '?', '#', ':']) {
        return Err("no host in it".to_owned());
    }
    Ok(complete)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_without_a_scheme_gets_the_one_that_its_settings_ask_for() {
        for (given, tls, expected) in [
            ("127.0.0.1:6443", true, "https://127.0.0.1:6443"),
            ("127.0.0.1:8080", false, "http://127.0.0.1:8080"),
            ("[fd00::1]:6443", true, "https://[fd00::1]:6443"),
            ("api.example", true, "https://api.example"),
            ("api.example:6443/", true, "https://api.example:6443/"),
            ("http://10.0.0.1:8080", true, "http://10.0.0.1:8080"),
            ("HTTPS://10.0.0.1/prefix", false, "HTTPS://10.0.0.1/prefix"),
        ] {
            assert_eq!(url(given, tls).as_deref(), Ok(expected), "{given}");
        }
    }

    #[test]
    fn what_cannot_be_a_server_is_refused() {
        for (given, reason) in [
            ("", "host"),
            ("https://", "host"),
            ("https:///x", "host"),
            (":6443", "host"),
            ("10.0.0.1:6443/prefix", "URL or HOST:PORT"),
            ("unix:///run/api", "unix"),
        ] {
            let refused = url(given, true).expect_err(given);
            assert!(refused.contains(reason), "{given}: {refused}");
        }
    }
}
