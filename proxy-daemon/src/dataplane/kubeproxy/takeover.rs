//! When what kube-proxy left is removed: once all that Services want is there, and never while a
//! kube-proxy runs. On a thread, since a table of a hundred thousand rules takes seconds to
//! exchange.

use std::fmt;
use std::thread::JoinHandle;

use tracing::{debug, warn};

use super::Leftovers;

/// Why a kube-proxy must be thought to run on this node; `None` when it seems not to.
pub type Rival = Box<dyn Fn() -> Option<String> + Send>;

pub struct Takeover {
    rival: Rival,
    stage: Stage,
    waiting_said: bool,
}

impl fmt::Debug for Takeover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Takeover").field("stage", &self.stage).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Stage {
    /// Leftovers may be there.
    Due(Leftovers),
    Removing(JoinHandle<(Leftovers, bool)>),
    /// All is removed: if it comes back, somebody makes it.
    Removed(Leftovers),
    Looking(#[expect(dead_code, reason = "nobody waits for it")] JoinHandle<()>),
    Over,
}

impl Takeover {
    pub fn new(leftovers: Leftovers, rival: Rival) -> Self {
        Self { rival, stage: Stage::Due(leftovers), waiting_said: false }
    }

    /// Why a kube-proxy must be thought to run on this node.
    pub fn rival(&self) -> Option<String> {
        (self.rival)()
    }

    /// For taking down: everything goes, in the calling thread.
    pub fn into_leftovers(self) -> Option<Leftovers> {
        match self.stage {
            Stage::Due(leftovers) | Stage::Removed(leftovers) => Some(leftovers),
            Stage::Removing(_) | Stage::Looking(_) | Stage::Over => None,
        }
    }

    /// Brings the stage up to date; the leftovers when they are to be removed now.
    pub fn due(&mut self) -> Option<&mut Leftovers> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Removing(thread) if thread.is_finished() => match thread.join() {
                Ok((leftovers, true)) => Stage::Removed(leftovers),
                Ok((leftovers, false)) => Stage::Due(leftovers),
                Err(_) => Stage::Over,
            },
            Stage::Removed(leftovers) => start("look", || look(leftovers), Stage::Looking),
            stage => stage,
        };
        if !matches!(self.stage, Stage::Due(_)) {
            return None;
        }
        if let Some(reason) = self.rival() {
            if !self.waiting_said {
                warn!(
                    reason,
                    "kube-proxy seems to run on this node: what it has made stays. Stop it; \
                     its leftovers are then removed at the next resync"
                );
            }
            self.waiting_said = true;
            return None;
        }
        match &mut self.stage {
            Stage::Due(leftovers) => Some(leftovers),
            _ => None,
        }
    }

    /// Begins to remove what is due, on a thread.
    pub fn remove(&mut self) {
        if let Stage::Due(leftovers) = std::mem::replace(&mut self.stage, Stage::Over) {
            self.stage = start("takeover", || remove(leftovers), Stage::Removing);
        }
    }
}

fn start<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
    stage: fn(JoinHandle<T>) -> Stage,
) -> Stage {
    match std::thread::Builder::new().name(name.to_owned()).spawn(work) {
        Ok(thread) => stage(thread),
        Err(error) => {
            warn!(%error, "cannot start a thread to remove what kube-proxy left; restart to retry");
            Stage::Over
        }
    }
}

fn remove(mut leftovers: Leftovers) -> (Leftovers, bool) {
    let result = leftovers.take_over();
    if let Err(error) = &result {
        warn!(
            %error,
            "cannot remove what kube-proxy left, which may refuse connections to new ports; \
             trying again at the next resync. By hand, with kube-proxy's own image: \
             `kube-proxy --cleanup`"
        );
    }
    (leftovers, result.is_ok())
}

fn look(mut leftovers: Leftovers) {
    match leftovers.present() {
        Ok(false) => {}
        Ok(true) => warn!(
            "iptables chains, ipsets or nf_tables tables of kube-proxy came back after they were removed: it \
             still runs on this node. Stop it, then restart this daemon to remove them"
        ),
        Err(error) => debug!(%error, "cannot see whether kube-proxy came back"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::ipset::FakeIpSets;
    use crate::kernel::netlink::FakeNetlink;
    use crate::kernel::xtables::FakeXTables;

    fn leftovers(sets: &FakeIpSets) -> Leftovers {
        let netlink = Box::new(FakeNetlink::default());
        Leftovers::new(netlink, Box::new(FakeXTables::default()), Box::new(sets.clone()))
    }

    fn sets() -> FakeIpSets {
        let sets = FakeIpSets::default();
        let names = ["KUBE-EXTERNAL-IP", "KUBE-NODE-PORT-TCP"];
        sets.state().sets.extend(names.map(|name| (name.to_owned(), Vec::new())));
        sets
    }

    /// Until the thread that was started has ended, and one step more.
    fn settle(takeover: &mut Takeover) {
        while matches!(&takeover.stage, Stage::Removing(thread) if !thread.is_finished()) {
            std::thread::yield_now();
        }
        let _ = takeover.due();
    }

    #[test]
    fn nothing_goes_while_kube_proxy_seems_to_run() {
        let sets = sets();
        let answer = std::sync::Arc::new(std::sync::Mutex::new(true));
        let shared = std::sync::Arc::clone(&answer);
        let rival = move || shared.lock().unwrap().then(|| "port taken".to_owned());
        let mut takeover = Takeover::new(leftovers(&sets), Box::new(rival));
        assert!(takeover.due().is_none());
        assert_eq!(sets.state().sets.len(), 2);
        *answer.lock().unwrap() = false;
        assert!(takeover.due().is_some());
        takeover.remove();
        settle(&mut takeover);
        assert!(matches!(takeover.stage, Stage::Removed(_)));
        assert!(sets.state().sets.is_empty());
    }

    #[test]
    fn what_fails_is_tried_again_and_what_is_done_is_done_once() {
        let sets = FakeIpSets::default();
        sets.state().sets.insert("KUBE-CLUSTER-IP".to_owned(), Vec::new());
        let refusing = FakeNetlink::new(|_| Err(crate::kernel::netlink::Errno(1)));
        let kernel = refusing.clone();
        let xtables = Box::new(FakeXTables::default());
        let leftovers = Leftovers::new(Box::new(refusing), xtables, Box::new(sets.clone()));
        let mut takeover = Takeover::new(leftovers, Box::new(|| None));
        takeover.remove();
        settle(&mut takeover);
        assert!(matches!(takeover.stage, Stage::Due(_)), "{:?}", takeover.stage);
        assert_eq!(sets.state().sets.len(), 1);
        kernel.respond(|_| Ok(Vec::new()));
        takeover.remove();
        settle(&mut takeover);
        assert!(sets.state().sets.is_empty());
        assert!(takeover.due().is_none() && takeover.due().is_none());
        assert!(matches!(takeover.stage, Stage::Looking(_)), "seen once whether it comes back");
    }
}
