//! Values as kube-proxy's flags (Go's `pflag`, `time.Duration`, `net`) write them.
//!
//! Each parser answers with the typed value or with a sentence that says what is
//! accepted; the caller adds the name of the flag and the value.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnetwork::IpNetwork;

/// What would have been accepted.
pub type Expected = String;

const NANOS: u128 = 1_000_000_000;

/// Go's `strconv.ParseBool`.
pub fn boolean(raw: &str) -> Result<bool, Expected> {
    match raw {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("must be true or false".to_owned()),
    }
}

/// Go's `time.ParseDuration`, without negative durations: no flag here has a use for one.
pub fn duration(raw: &str) -> Result<Duration, Expected> {
    let expected = || {
        "must be a duration of numbers with units (ns, us, ms, s, m, h), for example 30s, 1m0s \
         or 2h45m; 0 needs no unit"
            .to_owned()
    };
    if raw.starts_with('-') {
        return Err("must not be negative".to_owned());
    }
    let mut rest = raw.strip_prefix('+').unwrap_or(raw);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(expected());
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let (nanos, tail) = duration_term(rest).ok_or_else(expected)?;
        total = total.checked_add(nanos).ok_or_else(expected)?;
        rest = tail;
    }
    // Go keeps durations in an i64 of nanoseconds and refuses more.
    if total > u128::from(i64::MAX.unsigned_abs()) {
        return Err("must be shorter than 292 years".to_owned());
    }
    let seconds = u64::try_from(total / NANOS).map_err(|_| expected())?;
    let nanos = u32::try_from(total % NANOS).map_err(|_| expected())?;
    Ok(Duration::new(seconds, nanos))
}

/// One number and its unit off the front, as nanoseconds, and what follows.
fn duration_term(text: &str) -> Option<(u128, &str)> {
    let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, tail) = text.split_at(number_len);
    let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
    let (unit, tail) = tail.split_at(unit_len);
    let scale: u128 = match unit {
        "ns" => 1,
        // U+00B5 and U+03BC, both of which Go takes.
        "us" | "µs" | "μs" => 1_000,
        "ms" => 1_000_000,
        "s" => NANOS,
        "m" => 60 * NANOS,
        "h" => 3_600 * NANOS,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits = |text: &str| {
        if text.is_empty() { Some(0) } else { text.parse::<u128>().ok() }
    };
    let mut nanos = digits(whole)?.checked_mul(scale)?;
    // More than 15 digits cannot change a whole number of nanoseconds.
    let fraction = fraction.get(..15).unwrap_or(fraction);
    let divisor = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    nanos = nanos.checked_add(digits(fraction)?.checked_mul(scale)? / divisor)?;
    Some((nanos, tail))
}

/// Go's `Duration.String`: `24h0m0s`, `1m30s`, `1.5s`, `250ms`, `0s`.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    let fractional = |nanos: u128, scale: u128| {
        let text = format!("{}.{:09}", nanos / scale, (nanos % scale) * (NANOS / scale));
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match nanos {
        0 => "0s".to_owned(),
        1..1_000 => format!("{nanos}ns"),
        1_000..1_000_000 => format!("{}µs", fractional(nanos, 1_000)),
        1_000_000..NANOS => format!("{}ms", fractional(nanos, 1_000_000)),
        _ => {
            let total = duration.as_secs();
            let (hours, minutes) = (total / 3_600, total / 60 % 60);
            let seconds = fractional(nanos % (60 * NANOS), NANOS);
            match (hours, minutes) {
                (0, 0) => format!("{seconds}s"),
                (0, _) => format!("{minutes}m{seconds}s"),
                _ => format!("{hours}h{minutes}m{seconds}s"),
            }
        }
    }
}

/// A CIDR block, host bits cleared. A bare address is refused as kube-proxy does: a
/// forgotten prefix length is more likely than a block of one address.
pub fn cidr(raw: &str) -> Result<IpNetwork, Expected> {
    let expected =
        || "must be a CIDR block, for example 10.244.0.0/16 or fd00:10:244::/56".to_owned();
    if !raw.contains('/') {
        return Err(expected());
    }
    let network: IpNetwork = raw.parse().map_err(|_| expected())?;
    IpNetwork::new(network.network(), network.prefix()).map_err(|_| expected())
}

/// The items of a comma-separated list; an empty string is an empty list.
pub fn items(raw: &str) -> impl Iterator<Item = &str> {
    raw.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// Comma-separated CIDR blocks.
pub fn cidrs(raw: &str) -> Result<Vec<IpNetwork>, Expected> {
    items(raw).map(|item| cidr(item).map_err(|expected| format!("{item:?} {expected}"))).collect()
}

/// `IP:port`, or an IP alone, which gets `default_port`. Empty means: do not serve. Port 0 lets
/// the kernel choose one, as for kube-proxy.
pub fn bind_address(raw: &str, default_port: u16) -> Result<Option<SocketAddr>, Expected> {
    if raw.is_empty() {
        return Ok(None);
    }
    if let Ok(address) = raw.parse::<SocketAddr>() {
        return Ok(Some(address));
    }
    let bare = raw.strip_prefix('[').and_then(|r| r.strip_suffix(']')).unwrap_or(raw);
    bare.parse::<IpAddr>().map(|ip| Some(SocketAddr::new(ip, default_port))).map_err(|_| {
        "must be IP:port or an IP, for example 0.0.0.0:10256 or [::]:10256; empty disables"
            .to_owned()
    })
}

/// A decimal number within the bounds, both included.
pub fn number(raw: &str, min: u32, max: u32) -> Result<u32, Expected> {
    raw.parse::<u32>()
        .ok()
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| format!("must be a whole number from {min} to {max}"))
}

/// A network interface name or the beginning of one: at most 15 bytes (`IFNAMSIZ` with
/// its terminator, linux/if.h) and none the kernel refuses (`dev_valid_name`).
pub fn interface(raw: &str) -> Result<String, Expected> {
    let valid = raw.len() <= 15
        && !matches!(raw, "." | "..")
        && !raw.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    if valid {
        Ok(raw.to_owned())
    } else {
        Err("must be an interface name of at most 15 characters without '/', ':' or spaces"
            .to_owned())
    }
}

/// The name of an IPVS scheduler, so far as its form goes (`IP_VS_SCHEDNAME_MAXLEN` is 16
/// with its terminator); whether the kernel has it shows when it is first used.
pub fn scheduler(raw: &str) -> Result<String, Expected> {
    match raw {
        // kube-proxy: empty means the default.
        "" => Ok("rr".to_owned()),
        _ if raw.len() <= 15 && raw.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') => {
            Ok(raw.to_owned())
        }
        _ => Err("must be the name of an IPVS scheduler, for example rr, wrr, lc, wlc, sh, mh, \
                  sed or nq"
            .to_owned()),
    }
}
