//! The IPVS data plane: virtual servers by generic netlink, their addresses on a dummy
//! link, and what IPVS cannot do in nf_tables sets of our own.

mod apply;
mod cleanup;
pub mod codec;
mod flows;
mod objects;
mod proc;
mod readback;
mod release;
pub mod ruleset;
mod takeover;
#[cfg(test)]
mod tests;
mod traffic;

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use nix::libc;
use tracing::{info, warn};

use self::codec::{Requests, SchedulerName, Timeouts, VirtualServer, VirtualServerKey};
use self::flows::StaleFlows;
use self::readback::{Scope, SharedSeams};
use self::ruleset::{Ruleset, RulesetConfig};
use super::kubeproxy::Takeover;
use super::{Dataplane, FlowRelease, OpError, PlaneError, Reader, Surroundings, WorkDone};
use crate::kernel::conntrack::Conntrack;
use crate::kernel::links::Links;
use crate::kernel::modules::MissingModule;
use crate::kernel::netlink::generic::resolve_family;
use crate::kernel::netlink::{Errno, Netlink};
use crate::kernel::sysctl::{KernelVersion, Sysctls, ipvs_settings};
use crate::model::{Family, LocalDetect, Node, Pool};
use crate::plan::Op;
use crate::policy::{Frontend, FrontendKey};

pub use objects::{Forward, Key, ServerConfig, Value};
pub use readback::ReadSeams;
pub use traffic::IpvsTraffic;

/// The dummy link, named as kube-proxy names it, so that its addresses are taken over.
pub const LINK: &str = "kube-ipvs0";

/// A mark that nobody routes by, for the virtual server that tries the scheduler.
const TRIAL_MARK: u32 = 0x7FFF_5EED;

/// What counts as a pod of this node, which may depend on the Node (NodeCIDR mode).
pub type LocalDetection = Box<dyn Fn(Option<&Node>) -> LocalDetect + Send>;

pub struct IpvsConfig {
    pub scheduler: SchedulerName,
    pub families: Vec<Family>,
    pub masquerade_all: bool,
    pub masquerade_bit: u8,
    pub local_detection: LocalDetection,
    pub sysctl_root: PathBuf,
    pub strict_arp: bool,
    pub tcp_timeout: Option<Duration>,
    pub tcp_fin_timeout: Option<Duration>,
    pub udp_timeout: Option<Duration>,
    /// Virtual servers and addresses in these are not deleted as kube-proxy's, nor when
    /// taking down.
    pub exclude_cidrs: Vec<IpNetwork>,
}

impl fmt::Debug for IpvsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IpvsConfig").field("scheduler", &self.scheduler).finish_non_exhaustive()
    }
}

/// The kernel interfaces of this plane.
pub struct Seams<N> {
    /// Generic netlink.
    pub generic: N,
    /// Netfilter netlink.
    pub netfilter: N,
    pub links: Box<dyn Links>,
    pub conntrack: Box<dyn Conntrack>,
    pub kernel: KernelVersion,
    /// Others of the same kind, for reading back at the same time.
    pub reading: ReadSeams<N>,
    pub takeover: Takeover,
    pub predecessor: Predecessor,
}

/// Ends what another mode of this daemon has left, once IPVS stands in its place; true when there
/// is nothing (more) to end.
pub type Predecessor = Box<dyn FnMut() -> bool + Send>;

impl<N> fmt::Debug for Seams<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seams").field("kernel", &self.kernel).finish_non_exhaustive()
    }
}

pub struct IpvsPlane<N: Netlink> {
    config: IpvsConfig,
    generic: N,
    ruleset: Ruleset<N>,
    links: Box<dyn Links>,
    conntrack: Box<dyn Conntrack>,
    stale_flows: StaleFlows,
    releases: Vec<FlowRelease>,
    /// That stale entries cannot be deleted was said.
    release_failing: bool,
    kernel: KernelVersion,
    reading: SharedSeams<N>,
    requests: Option<Requests>,
    link: u32,
    local_detect: LocalDetect,
    service_cidrs: Vec<IpNetwork>,
    /// Sysctls that could not be set, so that each is said once.
    complained: Vec<&'static str>,
    /// Those that Services asked for, and whether the kernel has them.
    schedulers: HashMap<SchedulerName, bool>,
    /// Most virtual servers have one and the same.
    configurations: Pool<ServerConfig>,
    /// Only absent while it is being used.
    takeover: Option<Takeover>,
    /// `None`: it is gone.
    predecessor: Option<Predecessor>,
}

impl<N: Netlink> fmt::Debug for IpvsPlane<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IpvsPlane").field("config", &self.config).finish_non_exhaustive()
    }
}

/// By the family id, which the kernel hands out when the module is loaded.
fn find_family(
    netlink: &mut impl Netlink,
    known: &mut Option<Requests>,
) -> Result<Requests, PlaneError> {
    if let Some(requests) = known {
        return Ok(*requests);
    }
    let family =
        resolve_family(netlink, "IPVS", "ip_vs").map_err(|error| PlaneError::new("IPVS", error))?;
    Ok(*known.insert(Requests::new(family)))
}

impl<N: Netlink + 'static> IpvsPlane<N> {
    pub fn new(config: IpvsConfig, seams: Seams<N>) -> Self {
        let local_detect = (config.local_detection)(None);
        Self {
            config,
            generic: seams.generic,
            ruleset: Ruleset::new(seams.netfilter),
            links: seams.links,
            conntrack: seams.conntrack,
            stale_flows: StaleFlows::default(),
            releases: Vec::new(),
            release_failing: false,
            kernel: seams.kernel,
            reading: SharedSeams::new(seams.reading),
            requests: None,
            link: 0,
            local_detect,
            service_cidrs: Vec::new(),
            complained: Vec::new(),
            schedulers: HashMap::new(),
            configurations: Pool::default(),
            takeover: Some(seams.takeover),
            predecessor: Some(seams.predecessor),
        }
    }

    fn requests(&mut self) -> Result<Requests, PlaneError> {
        find_family(&mut self.generic, &mut self.requests)
    }

    fn set_sysctls(&mut self) -> Result<(), PlaneError> {
        let sysctls = Sysctls::at(&self.config.sysctl_root);
        for setting in ipvs_settings(self.kernel, self.config.strict_arp) {
            match sysctls.set(&setting) {
                Ok(true) => info!(sysctl = setting.name, value = setting.value, "set"),
                Ok(false) => {}
                // Nothing is masqueraded without it: better not to start.
                Err(error) if setting.name.ends_with("vs/conntrack") => {
                    return Err(PlaneError::new("sysctls", error));
                }
                Err(error) if !self.complained.contains(&setting.name) => {
                    self.complained.push(setting.name);
                    warn!(%error, wanted = setting.value, "going on without this sysctl");
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn set_timeouts(&mut self, requests: Requests) -> Result<(), PlaneError> {
        let seconds = |time: Option<Duration>| {
            time.map(|time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX))
        };
        let timeouts = Timeouts {
            tcp: seconds(self.config.tcp_timeout),
            tcp_fin: seconds(self.config.tcp_fin_timeout),
            udp: seconds(self.config.udp_timeout),
        };
        if timeouts == Timeouts::default() {
            return Ok(());
        }
        self.one(requests.set_timeouts(&timeouts))?
            .map_err(|errno| PlaneError::new("IPVS timeouts", errno))
    }

    /// The scheduler that must be there for the process to start.
    fn check_scheduler(&mut self) -> Result<(), PlaneError> {
        let scheduler = self.config.scheduler.clone();
        if self.try_scheduler(&scheduler)? {
            return Ok(());
        }
        let feature = format!("IPVS scheduler `{scheduler}` (--ipvs-scheduler)");
        Err(PlaneError::new("IPVS scheduler", MissingModule::new(scheduler.module(), feature)))
    }

    /// Makes and deletes a virtual server with the scheduler, which loads its module.
    fn try_scheduler(&mut self, scheduler: &SchedulerName) -> Result<bool, PlaneError> {
        let requests = self.requests()?;
        let Some(mark) = NonZeroU32::new(TRIAL_MARK) else { return Ok(true) };
        let key = VirtualServerKey::FwMark { mark, family: Family::V4 };
        match self.one(requests.new_service(&VirtualServer::new(key, scheduler.clone())))? {
            Ok(()) => {}
            Err(Errno(libc::ENOENT)) => return Ok(false),
            // Left by a start that was killed right here.
            Err(Errno(libc::EEXIST)) => {}
            Err(errno) => return Err(PlaneError::new("IPVS scheduler", errno)),
        }
        self.one(requests.del_service(&key))?
            .map_err(|errno| PlaneError::new("IPVS scheduler trial", errno))?;
        Ok(true)
    }

    /// The one that the Service asks for if the kernel has it, else the node's.
    fn scheduler_for(&mut self, frontend: &Frontend) -> SchedulerName {
        let asked = frontend.scheduling.as_ref().and_then(|said| said.scheduler.as_deref());
        let Some(asked) = asked.and_then(|name| SchedulerName::new(name).ok()) else {
            return self.config.scheduler.clone();
        };
        if !self.schedulers.contains_key(&asked) {
            let usable = match self.try_scheduler(&asked) {
                Ok(usable) => usable,
                Err(error) => {
                    warn!(%error, scheduler = %asked, "cannot try this scheduler");
                    return self.config.scheduler.clone();
                }
            };
            if !usable {
                let module = asked.module();
                warn!(
                    scheduler = %asked, service = %frontend.port.service,
                    "the kernel lacks this scheduler, `{}` is used instead: load {module} and \
                     restart this daemon", self.config.scheduler
                );
            }
            self.schedulers.insert(asked.clone(), usable);
        }
        let usable = self.schedulers.get(&asked).copied().unwrap_or_default();
        if usable { asked } else { self.config.scheduler.clone() }
    }

    fn one(
        &mut self,
        request: crate::kernel::netlink::Message,
    ) -> Result<Result<(), Errno>, PlaneError> {
        let results =
            self.generic.request_all(&[request]).map_err(|error| PlaneError::new("IPVS", error))?;
        results.into_iter().next().ok_or_else(|| PlaneError::new("IPVS", "no answer"))
    }

    /// Everything that must be there for this plane to work at all: to be called at start,
    /// so that the process ends with a sentence instead of failing later.
    ///
    /// # Errors
    /// Names the missing module or sysctl and what to do.
    pub fn check(&mut self) -> Result<(), PlaneError> {
        let requests = self.requests()?;
        self.open_link()?;
        self.leave_out_disabled();
        self.set_sysctls()?;
        self.check_scheduler()?;
        self.set_timeouts(requests)
    }

    /// The families of Services that it programs; fewer after [`IpvsPlane::check`] when the
    /// kernel has one switched off.
    pub fn families(&self) -> &[Family] {
        &self.config.families
    }

    /// Where IPv6 is off the link takes no address of the family (`EACCES`): each Service
    /// would fail for ever.
    fn leave_out_disabled(&mut self) {
        let name = format!("net/ipv6/conf/{LINK}/disable_ipv6");
        let disabled = Sysctls::at(&self.config.sysctl_root).read(&name);
        if disabled.is_ok_and(|value| value == "1") && self.config.families.contains(&Family::V6) {
            self.config.families.retain(|family| *family != Family::V6);
            warn!(
                sysctl = name,
                "IPv6 is switched off: only IPv4 Services are programmed. When it is on, also \
                 for {LINK}, restart this daemon"
            );
        }
    }

    fn open_link(&mut self) -> Result<(), PlaneError> {
        self.link =
            self.links.ensure_dummy(LINK).map_err(|error| PlaneError::new("link", error))?;
        Ok(())
    }
}

impl<N: Netlink + 'static> Dataplane for IpvsPlane<N> {
    type Key = Key;

    fn lower(&mut self, key: &FrontendKey, frontend: &Frontend) -> Vec<(Key, Value)> {
        let scheduler = self.scheduler_for(frontend);
        let mut objects = objects::lower(key, frontend, &scheduler);
        for (_, value) in &mut objects {
            if let Value::VirtualServer(config) = value {
                *config = self.configurations.get(config, |_| Arc::clone(config));
            }
        }
        objects
    }

    fn surroundings_changed(&mut self, now: Surroundings<'_>) -> bool {
        let detect = (self.config.local_detection)(now.node);
        let changed = detect != self.local_detect || now.service_cidrs != self.service_cidrs;
        self.local_detect = detect;
        self.service_cidrs = now.service_cidrs.to_vec();
        changed
    }

    fn prepare(&mut self) -> Result<(), PlaneError> {
        self.requests()?;
        self.open_link()?;
        self.set_sysctls()?;
        let config = RulesetConfig {
            masquerade_all: self.config.masquerade_all,
            masquerade_bit: self.config.masquerade_bit,
            local_detect: self.local_detect.clone(),
            service_cidrs: self.service_cidrs.clone(),
            families: self.config.families.clone(),
        };
        self.ruleset.ensure(&config).map_err(|error| PlaneError::new("nf_tables", error))?;
        Ok(())
    }

    fn reader(&mut self) -> Result<Reader<Key>, PlaneError> {
        let families = self.ruleset.families().to_vec();
        let scope = Scope { families, link: self.link, requests: self.requests()? };
        Ok(self.reading.reader(scope))
    }

    fn found(&mut self, key: &Key, value: &Value) {
        self.stale_flows.found(key, value);
    }

    fn apply(&mut self, ops: &[Op<Key>]) -> Vec<Result<(), OpError>> {
        let results = self.apply_all(ops);
        self.stale_flows.applied(ops, &results);
        self.release_flows();
        results
    }

    fn unused(&mut self, retired: &[Key]) -> Result<Vec<Key>, PlaneError> {
        self.without_connections(retired)
    }

    fn superseded(&mut self, foreign: &HashMap<Key, Value>) -> Vec<Key> {
        if self.predecessor.as_mut().is_some_and(|end| end()) {
            self.predecessor = None;
        }
        self.take_over(foreign)
    }

    fn work(&self) -> WorkDone {
        let parts = [
            self.generic.counters(),
            self.ruleset.netlink().counters(),
            self.links.counters(),
            self.conntrack.counters(),
        ];
        let read = self.reading.work();
        WorkDone {
            requests: parts.iter().map(|p| p.requests).sum::<u64>() + read.requests,
            dumps: parts.iter().map(|p| p.dumps).sum::<u64>() + read.dumps,
            sends: parts.iter().map(|p| p.sends).sum::<u64>() + read.sends,
        }
    }

    fn take_releases(&mut self) -> Vec<FlowRelease> {
        std::mem::take(&mut self.releases)
    }
}
