//! What holds for any bytes. That the kernel understands the requests is shown with
//! the ruleset that is made of them.

use proptest::collection::vec;
use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

use super::{
    BaseChain, ChainKind, CtKey, ElementBytes, Expression, Hook, Operation, Register, RuleInfo,
    Shape, Table, Verdict, attributes, decode_chain, decode_chain_info, decode_elements,
    decode_rule, decode_rule_info, decode_set,
};
use crate::kernel::netlink::Message;
use crate::model::Family;

const TABLE: Table<'_> = Table { family: Family::V4, name: "t" };

proptest! {
    #[test]
    fn arbitrary_bytes_are_decoded_or_rejected(payload in vec(any::<u8>(), 0..256)) {
        prop_assert!(attributes(&payload).count() <= payload.len());
        let message = Message { kind: 0, flags: 0, payload };
        let _ = decode_chain(&message);
        let _ = decode_rule(&message);
        let _ = decode_chain_info(&message);
        let _ = decode_rule_info(&message);
        let _ = decode_set(&message);
        let _ = decode_elements(&message.payload);
    }

    /// Bytes that are almost right go deeper than arbitrary ones.
    #[test]
    fn damaged_lists_are_decoded_or_rejected(
        keys in vec(vec(any::<u8>(), 12), 1..20),
        position in any::<proptest::sample::Index>(),
        value in any::<u8>(),
        cut in any::<proptest::sample::Index>(),
    ) {
        let elements = plain(keys);
        let mut message =
            TABLE.change_elements(Operation::Add, "s", Shape::Key, &references(&elements)).remove(0);
        let position = position.index(message.payload.len());
        message.payload[position] = value;
        message.payload.truncate(cut.index(message.payload.len() + 1));
        if let Ok(decoded) = decode_elements(&message.payload) {
            prop_assert!(decoded.len() <= elements.len() + 1);
        }
    }

    #[test]
    fn elements_survive_the_encoding(
        pairs in vec((vec(any::<u8>(), 1..64), vec(any::<u8>(), 1..64)), 0..100),
    ) {
        let with: Vec<ElementBytes> =
            pairs.into_iter().map(|(key, more)| ElementBytes { key, more }).collect();
        let without = plain(with.iter().map(|element| element.key.clone()).collect());
        for (shape, elements) in
            [(Shape::Key, &without), (Shape::Interval, &with), (Shape::Data, &with)]
        {
            let messages =
                TABLE.change_elements(Operation::Add, "set", shape, &references(elements));
            prop_assert_eq!(&decode_elements(&messages[0].payload).unwrap(), elements);
        }
        let replaced =
            TABLE.change_elements(Operation::Replace, "map", Shape::Data, &references(&with));
        prop_assert_eq!(decode_elements(&replaced[0].payload).unwrap(), without, "deleted by key");
        prop_assert_eq!(decode_elements(&replaced[1].payload).unwrap(), with);
    }

    #[test]
    fn a_full_message_stays_below_the_limit_of_an_attribute(length in 1_usize..64, more in 0..64_usize) {
        let element = ElementBytes { key: vec![1; length], more: vec![2; more] };
        let count = Table::elements_per_message(&element);
        let elements = vec![&element; count];
        let message =
            TABLE.change_elements(Operation::Delete, "set", Shape::Interval, &elements).remove(0);
        prop_assert!(message.payload.len() < usize::from(u16::MAX));
        prop_assert_eq!(decode_elements(&message.payload).unwrap().len(), count);
    }
}

fn plain(keys: Vec<Vec<u8>>) -> Vec<ElementBytes> {
    keys.into_iter().map(|key| ElementBytes { key, more: Vec::new() }).collect()
}

fn references(elements: &[ElementBytes]) -> Vec<&ElementBytes> {
    elements.iter().collect()
}

#[test]
fn where_a_rule_leads_is_read() {
    let compare = Expression::LoadCt { key: CtKey::State, to: Register(0) };
    let rule =
        |verdict| TABLE.append_rule("INPUT", &[compare.clone(), Expression::Verdict(verdict)]);
    for (verdict, expected) in [
        (Verdict::Jump("KUBE-FORWARD".to_owned()), vec!["KUBE-FORWARD".to_owned()]),
        (Verdict::Goto("OTHER".to_owned()), vec!["OTHER".to_owned()]),
        (Verdict::Accept, vec![]),
    ] {
        let decoded = decode_rule_info(&rule(verdict)).unwrap();
        let (table, chain) = ("t".to_owned(), "INPUT".to_owned());
        assert_eq!(decoded, RuleInfo { table, chain, handle: 0, jumps: expected, packets: None });
    }
}

#[test]
fn base_chains_are_told_from_others() {
    let base = BaseChain { kind: ChainKind::Filter, hook: Hook::Input, priority: 0 };
    let chain = |base| decode_chain_info(&TABLE.add_chain("c", base)).unwrap();
    assert_eq!((chain(Some(base)).base, chain(None).base), (true, false));
    let rule = decode_rule_info(&TABLE.delete_rule("c", 0x0102_0304_0506_0708)).unwrap();
    assert_eq!(rule.handle, 0x0102_0304_0506_0708);
}
