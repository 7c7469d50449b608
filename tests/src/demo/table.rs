//! The demonstration's table: what was sent where, who answered, what failed.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::traffic::{ConnectReport, Protocol};

/// Connections of one client to one frontend.
#[derive(Debug)]
pub struct Row {
    pub service: String,
    pub protocol: Protocol,
    pub frontend: SocketAddr,
    pub from: &'static str,
    /// The client's own address.
    pub client: IpAddr,
    /// The endpoints that should share the connections.
    pub endpoints: Vec<String>,
    pub report: ConnectReport,
}

impl Row {
    /// All answered, each endpoint had its part, and nobody else answered.
    fn is_good(&self) -> bool {
        let answered = &self.report.by_server;
        self.report.attempted > 0
            && self.report.failed() == 0
            && self.endpoints.iter().all(|name| answered.contains_key(name))
            && answered.keys().all(|name| self.endpoints.contains(name))
    }

    fn counts(&self) -> String {
        let mut names = self.endpoints.clone();
        let others = self.report.by_server.keys().filter(|name| !self.endpoints.contains(name));
        names.extend(others.cloned());
        let count = |name: &String| self.report.by_server.get(name).copied().unwrap_or(0);
        let parts: Vec<String> = names
            .iter()
            .map(|name| {
                format!("{}:{}", name.replace("node-", "").replace("-pod-", "/"), count(name))
            })
            .collect();
        parts.join("  ")
    }

    /// What endpoints saw as the client: its own address, or a node's.
    fn seen_as(&self) -> &'static str {
        let own = self.report.by_source.contains_key(&self.client);
        match (own, self.report.by_source.len()) {
            (_, 0) => "-",
            (true, 1) => "itself",
            (true, _) => "itself, node",
            (false, _) => "node",
        }
    }

    fn cells(&self) -> [String; 7] {
        [
            self.service.clone(),
            format!("{} {}", self.protocol, self.frontend),
            self.from.to_owned(),
            self.counts(),
            self.seen_as().to_owned(),
            format!("{:.1}", Duration::from_micros(self.report.latency.p50_us).as_secs_f64() * 1e3),
            self.report.failed().to_string(),
        ]
    }
}

/// Prints all rows and what went wrong; says whether nothing did.
pub fn print_table(rows: &[Row]) -> bool {
    const TITLES: [&str; 7] =
        ["Service", "frontend", "from", "endpoint:connections", "seen as", "p50 ms", "failures"];
    let cells: Vec<[String; 7]> = rows.iter().map(Row::cells).collect();
    let width = |column: usize| {
        let widest = cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
        widest.max(TITLES[column].len())
    };
    let widths: Vec<usize> = (0..TITLES.len()).map(width).collect();
    let line = |row: [&str; 7]| {
        let padded: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(TITLES);
    println!("{}", "-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)));
    for row in &cells {
        line(row.each_ref().map(String::as_str));
    }
    let mut good = !rows.is_empty();
    for row in rows.iter().filter(|row| !row.is_good()) {
        good = false;
        println!(
            "! {} {} from {}: {:?} {:?}",
            row.service, row.frontend, row.from, row.report.failures, row.report.examples
        );
    }
    good
}
