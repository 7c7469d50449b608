//! What holds for any bytes. That the kernel understands the requests is shown with
//! the ruleset that is made of them.

use proptest::collection::vec;
use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

use super::{Operation, Table, attributes, decode_chain, decode_elements, decode_rule, decode_set};
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
        let _ = decode_set(&message);
        let _ = decode_elements(&message);
    }

    /// Bytes that are almost right go deeper than arbitrary ones.
    #[test]
    fn damaged_lists_are_decoded_or_rejected(
        keys in vec(vec(any::<u8>(), 12), 1..20),
        position in any::<proptest::sample::Index>(),
        value in any::<u8>(),
        cut in any::<proptest::sample::Index>(),
    ) {
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let mut message = TABLE.change_elements(Operation::Add, "s", &keys);
        let position = position.index(message.payload.len());
        message.payload[position] = value;
        message.payload.truncate(cut.index(message.payload.len() + 1));
        if let Ok(decoded) = decode_elements(&message) {
            prop_assert!(decoded.len() <= keys.len() + 1);
        }
    }

    #[test]
    fn keys_survive_the_encoding(keys in vec(vec(any::<u8>(), 1..64), 0..200)) {
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let message = TABLE.change_elements(Operation::Add, "set", &keys);
        prop_assert_eq!(decode_elements(&message).unwrap(), keys);
    }

    #[test]
    fn a_full_message_stays_below_the_limit_of_an_attribute(length in 1_usize..64) {
        let key = vec![1; length];
        let count = Table::elements_per_message(length);
        let message = TABLE.change_elements(Operation::Delete, "set", &vec![key.as_slice(); count]);
        prop_assert!(message.payload.len() < usize::from(u16::MAX));
        prop_assert_eq!(decode_elements(&message).unwrap().len(), count);
    }
}
