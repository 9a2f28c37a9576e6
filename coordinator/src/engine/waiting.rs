//! Who waits, and who of them is next.
//!
//! Under the fair policy that is the earliest sequence of the tenant that was served least: the virtual token counter of
//! Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). A tenant is charged for the prompt tokens it had
//! computed when a sequence starts, and twice for every token it gets; one that comes back from a pause is lifted to the
//! least served of those that wait, so that nobody saves up service. Any two tenants that wait all along are served alike
//! up to a constant: twice the larger of the longest prompt and twice the tokens that the KV cache holds.

use std::collections::{BTreeMap, BTreeSet};

use phalanx_proto::step::SequenceId;

use super::{SchedulingPolicy, TenantId, sequence::Urgency};

/// What a computed prompt token and a sampled token cost, as in the paper.
const PROMPT_TOKEN: u64 = 1;
const OUTPUT_TOKEN: u64 = 2;
/// Beyond so many tenants, those without a waiting sequence that were served least are forgotten.
const MAX_REMEMBERED: usize = 4096;

/// Sequences that hold no blocks.
pub(super) struct WaitingQueue {
    by_urgency: BTreeMap<Urgency, (SequenceId, TenantId)>,
    /// Only under the fair policy.
    counters: Option<VirtualTokenCounters>,
}

impl WaitingQueue {
    pub(super) fn new(policy: SchedulingPolicy) -> Self {
        Self {
            by_urgency: BTreeMap::new(),
            counters: (policy == SchedulingPolicy::Fair).then(VirtualTokenCounters::default),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_urgency.len()
    }

    pub(super) fn get(&self, urgency: &Urgency) -> Option<SequenceId> {
        self.by_urgency.get(urgency).map(|&(id, _)| id)
    }

    /// Puts in a sequence that has just been submitted.
    pub(super) fn submit(&mut self, urgency: Urgency, id: SequenceId, tenant: TenantId) {
        if let Some(counters) = &mut self.counters {
            counters.arrive(tenant);
        }
        self.put_back(urgency, id, tenant);
    }

    /// Puts in a sequence that had its turn before.
    pub(super) fn put_back(&mut self, urgency: Urgency, id: SequenceId, tenant: TenantId) {
        self.by_urgency.insert(urgency, (id, tenant));
        if let Some(counters) = &mut self.counters {
            counters
                .tenants
                .entry(tenant)
                .or_default()
                .waiting
                .insert(urgency);
        }
    }

    pub(super) fn remove(&mut self, urgency: &Urgency) {
        if let (Some((_, tenant)), Some(counters)) = (self.by_urgency.remove(urgency), &mut self.counters) {
            counters.leave(tenant, urgency);
        }
    }

    /// The one to admit next.
    pub(super) fn next(&self) -> Option<(Urgency, SequenceId)> {
        let urgency = match &self.counters {
            None => *self.by_urgency.first_key_value()?.0,
            Some(counters) => counters.least_served()?,
        };
        Some((urgency, self.get(&urgency)?))
    }

    /// The most urgent of those that `wanted` holds for.
    pub(super) fn find(&self, wanted: impl Fn(SequenceId) -> bool) -> Option<(Urgency, SequenceId)> {
        let mut waiting = self.by_urgency.iter().map(|(&urgency, &(id, _))| (urgency, id));
        waiting.find(|&(_, id)| wanted(id))
    }

    /// A tenant's sequence has started, and so many tokens of its prompt were not cached.
    pub(super) fn charge_prompt(&mut self, tenant: TenantId, num_tokens: usize) {
        self.charge(tenant, PROMPT_TOKEN * num_tokens as u64);
    }

    pub(super) fn charge_output_token(&mut self, tenant: TenantId) {
        self.charge(tenant, OUTPUT_TOKEN);
    }

    fn charge(&mut self, tenant: TenantId, cost: u64) {
        if let Some(counters) = &mut self.counters {
            counters.tenants.entry(tenant).or_default().service += cost;
        }
    }

    /// What the tenant has had; the same for all where nobody counts.
    pub(super) fn service(&self, tenant: TenantId) -> u64 {
        let counted = self
            .counters
            .as_ref()
            .and_then(|counters| counters.tenants.get(&tenant));
        counted.map_or(0, |tenant| tenant.service)
    }
}

#[derive(Default)]
struct VirtualTokenCounters {
    tenants: BTreeMap<TenantId, Tenant>,
    /// The counter of the tenant that was the last to have no sequence waiting.
    last_left: u64,
}

#[derive(Default)]
struct Tenant {
    service: u64,
    waiting: BTreeSet<Urgency>,
}

impl VirtualTokenCounters {
    fn arrive(&mut self, tenant: TenantId) {
        if self
            .tenants
            .get(&tenant)
            .is_some_and(|tenant| !tenant.waiting.is_empty())
        {
            return;
        }
        let least = self.waiting().map(|(_, tenant)| tenant.service).min();
        let least = least.unwrap_or(self.last_left);
        let service = &mut self.tenants.entry(tenant).or_default().service;
        *service = least.max(*service);
    }

    fn leave(&mut self, id: TenantId, urgency: &Urgency) {
        let Some(tenant) = self.tenants.get_mut(&id) else {
            return;
        };
        tenant.waiting.remove(urgency);
        if tenant.waiting.is_empty() {
            self.last_left = tenant.service;
            self.forget();
        }
    }

    /// Names come from outside: there must not be any number of them. Those that wait are bounded by the queue.
    fn forget(&mut self) {
        if self.tenants.len() <= MAX_REMEMBERED {
            return;
        }
        let idle = self
            .tenants
            .iter()
            .filter(|(_, tenant)| tenant.waiting.is_empty());
        let least = idle.min_by_key(|(_, tenant)| tenant.service).map(|(&id, _)| id);
        least.and_then(|id| self.tenants.remove(&id));
    }

    fn waiting(&self) -> impl Iterator<Item = (&TenantId, &Tenant)> {
        self.tenants
            .iter()
            .filter(|(_, tenant)| !tenant.waiting.is_empty())
    }

    fn least_served(&self) -> Option<Urgency> {
        let first = |tenant: &Tenant| tenant.waiting.first().map(|&first| (tenant.service, first));
        let firsts = self.tenants.values().filter_map(first);
        firsts.min().map(|(_, urgency)| urgency)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    fn urgency(arrival: u64) -> Urgency {
        Urgency { priority: 0, arrival }
    }

    fn next(queue: &mut WaitingQueue) -> u64 {
        let (urgency, id) = queue.next().expect("somebody waits");
        queue.remove(&urgency);
        id.0
    }

    #[test]
    fn the_least_served_tenant_is_next_and_its_own_order_is_kept() {
        let mut queue = WaitingQueue::new(SchedulingPolicy::Fair);
        for (arrival, tenant) in [(0, A), (1, A), (2, A), (3, B), (4, B)] {
            queue.submit(urgency(arrival), SequenceId(arrival), tenant);
        }
        assert_eq!(next(&mut queue), 0, "both have had nothing");
        queue.charge_prompt(A, 10);
        assert_eq!(next(&mut queue), 3);
        queue.charge_prompt(B, 4);
        queue.charge_output_token(B);
        assert_eq!(next(&mut queue), 4, "10 are more than 6");
        assert_eq!(next(&mut queue), 1, "nobody else waits");
    }

    #[test]
    fn nobody_saves_up_service() {
        let mut queue = WaitingQueue::new(SchedulingPolicy::Fair);
        queue.submit(urgency(0), SequenceId(0), A);
        queue.charge_prompt(A, 1000);
        queue.submit(urgency(1), SequenceId(1), B);
        assert_eq!(queue.service(B), 1000, "B was not there when A was served");
        queue.charge_prompt(B, 50);
        assert_eq!((next(&mut queue), next(&mut queue)), (0, 1));
        queue.submit(urgency(2), SequenceId(2), TenantId(3));
        assert_eq!(queue.service(TenantId(3)), 1050, "as much as who left last");
    }

    #[test]
    fn other_policies_ask_nobody_who_they_are() {
        let mut queue = WaitingQueue::new(SchedulingPolicy::Fcfs);
        queue.submit(urgency(0), SequenceId(0), A);
        queue.charge_prompt(A, 1000);
        queue.submit(urgency(1), SequenceId(1), B);
        assert_eq!((next(&mut queue), queue.len()), (0, 1));
    }

    #[test]
    fn the_memory_of_tenants_has_a_bound() {
        let mut queue = WaitingQueue::new(SchedulingPolicy::Fair);
        for arrival in 0..3 * MAX_REMEMBERED as u64 {
            queue.submit(urgency(arrival), SequenceId(arrival), TenantId(arrival));
            next(&mut queue);
        }
        let counters = queue.counters.expect("fair");
        assert_eq!(counters.tenants.len(), MAX_REMEMBERED);
    }
}
