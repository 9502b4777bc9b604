// What the demo and its workers call the arrays that they share.
#pragma once

namespace cowmgr::knn {

inline constexpr const char* kTrainImages = "fashion-mnist/train/images";      // <f4 (rows, columns)
inline constexpr const char* kTrainLabels = "fashion-mnist/train/labels";      // |u1 (rows,)
inline constexpr const char* kTestImages = "fashion-mnist/test/images";        // <f4 (rows, columns)
inline constexpr const char* kPredictions = "fashion-mnist/test/predictions";  // |u1 (rows,), a result set

}  // namespace cowmgr::knn
