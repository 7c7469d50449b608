//! The test API server as a process: `test-apiserver --listen 127.0.0.1:6443
//! --kubeconfig-out kubeconfig --manifests manifests.yaml`.
//!
//! Objects change over HTTP as on any API server (`kubectl apply --validate=false`);
//! faults and request counters are under `/testing/` (see `apiserver::control`).

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use proxy_tests::apiserver::{ApiServer, Options, Resource};

#[derive(Debug, Parser)]
#[command(about = "A Kubernetes API server for tests")]
struct Args {
    /// Address to listen on; port 0 picks one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Writes a kubeconfig for the server.
    #[arg(long, value_name = "FILE")]
    kubeconfig_out: Option<PathBuf>,
    /// URL in the kubeconfig, where clients reach the server at another address.
    #[arg(long, value_name = "URL")]
    server_url: Option<String>,
    /// Further address for the certificate.
    #[arg(long, value_name = "IP")]
    extra_address: Vec<IpAddr>,
    /// YAML with objects to begin with.
    #[arg(long, value_name = "FILE")]
    manifests: Vec<PathBuf>,
    /// Adds N Services with M endpoints each.
    #[arg(long, value_name = "N:M", value_parser = parse_generate)]
    generate: Option<(usize, usize)>,
    /// Speaks plain HTTP.
    #[arg(long)]
    no_tls: bool,
    /// Bearer token that clients must send; empty lets everyone in.
    #[arg(long, default_value = "test-token")]
    token: String,
    /// Where the Service default/kubernetes leads.
    #[arg(long, value_name = "ADDR", default_value = "192.0.2.2:16443")]
    kubernetes_endpoint: SocketAddr,
}

fn parse_generate(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once(':').and_then(|(n, m)| Some((n.parse().ok()?, m.parse().ok()?)));
    parts.ok_or_else(|| "expected SERVICES:ENDPOINTS, such as 1000:10".to_owned())
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let server = ApiServer::start(Options {
        listen: args.listen,
        token: Some(args.token).filter(|token| !token.is_empty()),
        tls: !args.no_tls,
        extra_addresses: args.extra_address,
        kubernetes_endpoint: Some(args.kubernetes_endpoint),
        ..Options::default()
    })?;
    for path in &args.manifests {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        server.store().load_yaml(&text).with_context(|| path.display().to_string())?;
    }
    if let Some((services, endpoints)) = args.generate {
        server.store().load_generated(services, endpoints);
    }
    if let Some(path) = &args.kubeconfig_out {
        server.write_kubeconfig(path, args.server_url.as_deref())?;
    }
    let services = server.store().len(Resource::Service);
    let slices = server.store().len(Resource::EndpointSlice);
    println!("test-apiserver ready: {} services={services} endpointslices={slices}", server.url());
    std::io::stdout().flush()?;
    loop {
        std::thread::park();
    }
}
