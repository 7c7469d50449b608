//! The Kubernetes API as the source.
//!
//! Independent list-and-watch loops ([`pump`]), one per kind. Selection happens on
//! the server where it can, with the selectors of kube-proxy 1.36.

mod access;
mod client;
mod events;
mod failure;
mod kubeconfig;
mod lenient;
mod proxies;
mod pump;
mod server;

use super::announce::Announced;
use super::intake::{Nodes, Outlet, ServiceCidrs, Services, Slices};
use crate::model::NodeName;

pub use access::Access;
pub use client::ClientError;
use pump::{Pump, Selectors};

const SELECT_SERVICES: &str =
    "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
const SELECT_SLICES: &str = "!service.kubernetes.io/headless";

/// Delivers events until the receiver is dropped, and publishes what is announced. Never gives up: whatever the API
/// server does, what was delivered stays and the next attempt follows.
///
/// `Event::Services(Change::Reset)` and `Event::Slices(Change::Reset)` come once each
/// before anything else of their kind, also when the API holds none. ServiceCIDRs may
/// never come: API servers before Kubernetes 1.33 have no such kind.
pub async fn run(access: Access, node: NodeName, outlet: Outlet, announced: Announced) {
    let Access { clients, keeper } = access;
    let services =
        Pump::<Services>::new(clients.clone(), Selectors::labels(SELECT_SERVICES), outlet.clone());
    let slices =
        Pump::<Slices>::new(clients.clone(), Selectors::labels(SELECT_SLICES), outlet.clone());
    let nodes = Pump::<Nodes>::new(
        clients.clone(),
        Selectors::fields(format!("metadata.name={node}")),
        outlet.clone(),
    );
    let service_cidrs = Pump::<ServiceCidrs>::new(clients.clone(), Selectors::default(), outlet);
    let sources = async {
        tokio::join!(services.run(), slices.run(), nodes.run(), service_cidrs.run());
    };
    tokio::select! {
        () = sources => {}
        () = events::publish(clients, node, announced) => {}
        () = keeper.run() => {}
    }
}

#[cfg(test)]
mod tests;
